//! Which rows of activations meet which matrix.

use crate::{
    builder::Builder,
    isa::Isa,
    kernels::{Kernel, Scratch, rows::read_id},
    tensor::{Tensor, product},
};
use backend_api::Step;

/// A matrix of a product and the entries (rows of the output) that it makes.
#[derive(Clone, Copy)]
pub(crate) struct Problem {
    /// Index of the matrix.
    pub(crate) matrix: usize,
    /// Number of entries.
    pub(crate) count: usize,
    list: *const u32,
    first: usize,
    step: usize,
    share: usize,
}

impl Problem {
    /// The row of the output that entry `index` makes.
    ///
    /// # Safety
    /// The grouping has run, and `index < count`.
    #[inline(always)]
    pub(crate) unsafe fn output(&self, index: usize) -> usize {
        if self.list.is_null() {
            self.first + index * self.step
        } else {
            // SAFETY: the list has `count` entries.
            unsafe { *self.list.add(index) as usize }
        }
    }

    /// The row of activations that makes this row of the output.
    #[inline(always)]
    pub(crate) fn input(&self, output: usize) -> usize {
        output / self.share
    }
}

/// The problems of one product.
#[derive(Clone, Copy)]
pub(crate) enum Pairing {
    /// One matrix for all rows.
    Rows,
    /// Matrix `h` for rows `h, h + heads, …`.
    Heads(usize),
    /// The matrix that a row's expert id names; `share` neighbouring entries share a row of activations.
    Experts {
        /// Entries by expert.
        groups: Groups,
        /// Entries for each row of activations.
        share: usize,
    },
}

impl Pairing {
    /// An upper bound of the number of problems; none without `rows` of the output.
    pub(crate) fn problems(&self, rows: usize) -> usize {
        let matrices = match self {
            Pairing::Rows => 1,
            Pairing::Heads(heads) => *heads,
            Pairing::Experts { groups, .. } => groups.experts,
        };
        matrices.min(rows)
    }

    /// Problem `index`; `rows` is the number of rows of the output. `None` past the last.
    ///
    /// # Safety
    /// The grouping has run.
    #[inline(always)]
    pub(crate) unsafe fn problem(&self, index: usize, rows: usize) -> Option<Problem> {
        let list = std::ptr::null();
        match *self {
            Pairing::Rows => Some(Problem { matrix: 0, count: rows, list, first: 0, step: 1, share: 1 }),
            Pairing::Heads(heads) => Some(Problem {
                matrix: index,
                count: rows / heads,
                list,
                first: index,
                step: heads,
                share: 1,
            }),
            Pairing::Experts { groups, share } => {
                // SAFETY: the caller's.
                let (matrix, first, count) = unsafe { groups.group(index) }?;
                let list = groups.entries().wrapping_add(first);
                Some(Problem { matrix, count, list, first: 0, step: 1, share })
            }
        }
    }
}

/// The entries of `[rows, used]` expert ids sorted by expert: made once for all products with these ids.
#[derive(Clone, Copy)]
pub(crate) struct Groups {
    ids: Tensor,
    experts: usize,
    /// `[active, (expert, first, count) × experts, entries…]`, u32.
    table: *mut u32,
}

// SAFETY: an address; `Kernel::run` is where it is used.
unsafe impl Send for Groups {}
// SAFETY: as above.
unsafe impl Sync for Groups {}

impl Groups {
    pub(crate) fn of(ids: &Tensor, experts: usize, builder: &mut Builder) -> Self {
        builder.shared(ids, experts as u64, |builder| {
            let entries = product([ids.rows(&builder.capacity().full_step()), ids.width()]);
            let fields = product([3, experts]).saturating_add(entries).saturating_add(1);
            let table = builder.scratch_buffer(product([4, fields])).cast();
            let groups = Groups { ids: *ids, experts, table };
            builder.push(Group(groups));
            groups
        })
    }

    fn entries(&self) -> *const u32 {
        self.table.wrapping_add(1 + 3 * self.experts)
    }

    /// Expert, first entry and number of entries of group `index`.
    ///
    /// # Safety
    /// [`Group`] has filled the table.
    #[inline(always)]
    unsafe fn group(&self, index: usize) -> Option<(usize, usize, usize)> {
        // SAFETY: the caller's.
        unsafe {
            if index >= *self.table as usize {
                return None;
            }
            let at = |field: usize| *self.table.add(1 + 3 * index + field) as usize;
            Some((at(0), at(1), at(2)))
        }
    }
}

struct Group(Groups);

impl Kernel for Group {
    fn tasks(&self, _step: &Step) -> usize {
        1
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, step: &Step, _task: usize, scratch: &mut Scratch) {
        let Groups { ids, experts, table } = self.0;
        let (rows, used) = (ids.rows(step), ids.width());
        // SAFETY: the table has room for all experts and entries; ids are dense.
        unsafe {
            let mut expert = |entry: usize| read_id(&ids, entry, experts, "expert", scratch).unwrap_or(0);
            let group = |index: usize, field: usize| table.add(1 + 3 * index + field);
            for index in 0..experts {
                *group(index, 2) = 0;
            }
            for entry in 0..rows * used {
                *group(expert(entry), 2) += 1;
            }
            let mut first = 0;
            for index in 0..experts {
                *group(index, 1) = first;
                first += *group(index, 2);
            }
            let entries = table.add(1 + 3 * experts);
            for entry in 0..rows * used {
                let next = group(expert(entry), 1);
                *entries.add(*next as usize) = entry as u32;
                *next += 1;
            }
            // The cursors stand at the ends now. Experts with entries move to the front.
            let mut active = 0;
            for index in 0..experts {
                let count = *group(index, 2);
                if count > 0 {
                    let first = *group(index, 1) - count;
                    *group(active, 0) = index as u32;
                    *group(active, 1) = first;
                    *group(active, 2) = count;
                    active += 1;
                }
            }
            *table = active as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{each_level, rows, run};
    use backend_api::{DType, Shape, TensorDesc};

    #[test]
    fn entries_are_sorted_by_expert_wherever_the_ids_start() {
        let (experts, ids) = (4, [2i32, 0, 2, 3, 0, 2]);
        let desc = TensorDesc::new(DType::I32, Shape::rows(&[2]));
        each_level(|level| {
            for start in 0..4 {
                let mut bytes = vec![0; start];
                bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
                let ids = Tensor::new(bytes.as_mut_ptr().wrapping_add(start), desc);
                let mut table = [u32::MAX; 1 + 3 * 4 + 6];
                run(Group(Groups { ids, experts, table: table.as_mut_ptr() }), level, &rows(3));
                let groups = [table[0], table[1], table[2], table[3]];
                assert_eq!(
                    groups,
                    [3, 0, 0, 2],
                    "{level}: three experts; expert 0 has the first two entries"
                );
                assert_eq!(table[4..10], [2, 2, 3, 3, 5, 1], "{level}");
                assert_eq!(table[13..], [1, 4, 0, 2, 5, 3], "{level}");
            }
        });
    }
}
