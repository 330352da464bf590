//! Cutting rows into tasks.

use std::ops::Range;

/// Rows of some width in tasks of about equal work: several rows, one, or a part of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    width: usize,
    rows: usize,
    columns: usize,
    parts: usize,
}

impl Cut {
    /// Tasks of about `elements` elements. Parts of rows are whole vectors, the last excepted.
    pub(crate) fn new(width: usize, elements: usize) -> Self {
        let parts = width.div_ceil(elements).max(1);
        let columns = width.div_ceil(parts).next_multiple_of(16);
        Cut { width, rows: (elements / width.max(1)).max(1), columns, parts: width.div_ceil(columns).max(1) }
    }

    /// As [`Cut::new`], but rows stay whole.
    pub(crate) fn whole_rows(width: usize, elements: usize) -> Self {
        Cut { width, rows: (elements / width.max(1)).max(1), columns: width, parts: 1 }
    }

    pub(crate) fn tasks(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows) * self.parts
    }

    /// The rows of a task, of `rows` in all.
    #[inline(always)]
    pub(crate) fn rows(&self, task: usize, rows: usize) -> Range<usize> {
        let start = task / self.parts * self.rows;
        start..(start + self.rows).min(rows)
    }

    /// The columns of a task.
    #[inline(always)]
    pub(crate) fn columns(&self, task: usize) -> Range<usize> {
        let start = task % self.parts * self.columns;
        start..(start + self.columns).min(self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_exactly_one_task() {
        for width in [1, 7, 16, 17, 100, 4095, 4096, 4097, 20_000] {
            for rows in [0, 1, 2, 9, 300] {
                for cut in [Cut::new(width, 4096), Cut::whole_rows(width, 4096), Cut::new(width, 16)] {
                    let mut seen = vec![0u8; width * rows];
                    for task in 0..cut.tasks(rows) {
                        for row in cut.rows(task, rows) {
                            cut.columns(task).for_each(|column| seen[row * width + column] += 1);
                        }
                    }
                    assert!(seen.iter().all(|&count| count == 1), "{cut:?}, {rows} rows");
                }
            }
        }
    }
}
