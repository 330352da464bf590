//! Pieces of work put together to dispatches.
//!
//! A dispatch is dear where shaders run on the CPU and not free anywhere. So operations that work row by row become
//! chains, one dispatch each, and matrix products that wait for nothing share one; both may overtake others that they do
//! not depend on. What depends on what follows from the bytes that pieces touch, as nothing else checks it: shaders reach
//! memory by address, which validation layers do not follow.

use crate::{
    lower::{Access, Count, Cut, Kind, Piece},
    pipelines::Shader,
    shared::{ProductJob, RowOp},
};
use backend_api::{Capacity, Extent};

/// What one dispatch does.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    /// A chain.
    Rows { ops: Vec<RowOp>, extent: Extent },
    /// Products of one shader.
    Products { shader: Shader, jobs: Vec<ProductJob>, groups: u32, tiles: Vec<Count> },
    /// Anything else.
    Alone { shader: Shader, push: Vec<u8>, groups: [Count; 3], cut: Cut },
}

/// One dispatch.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub task: Task,
    /// Operations it is of, in order.
    pub ops: Vec<usize>,
    /// Whether it only helps another dispatch of its operation.
    pub helps: bool,
    /// Whether it has to wait for those before it.
    pub waits: bool,
    /// What it touches, piece by piece.
    accesses: Vec<(usize, Vec<Access>)>,
}

/// Whether the order of two pieces matters.
fn conflict(a: &[Access], b: &[Access]) -> bool {
    a.iter().any(|a| b.iter().any(|b| clash(a, b)))
}

fn clash(a: &Access, b: &Access) -> bool {
    (a.write || b.write) && a.span.start < b.span.end && b.span.start < a.span.end
}

/// Whether two pieces may be links of one chain, of which rows run in no order: where they clash, each row must keep to
/// its own bytes.
fn chains(earlier: &[Access], later: &[Access], one_row: bool) -> bool {
    one_row || earlier.iter().all(|a| later.iter().all(|b| !clash(a, b) || same_rows(a, b)))
}

fn same_rows(a: &Access, b: &Access) -> bool {
    let (Some(rows_a), Some(rows_b)) = (a.rows, b.rows) else { return false };
    let first = a.span.start.min(b.span.start);
    let last = (a.span.start + rows_a.size).max(b.span.start + rows_b.size);
    rows_a.stride == rows_b.stride && last - first <= rows_a.stride
}

/// Longest chain (`rows.comp` has constants for so many), and most products in a dispatch.
const MOST: usize = 8;

/// Orders pieces, which come in an order that respects data flow.
pub(crate) fn schedule(pieces: Vec<Piece>, capacity: &Capacity) -> Vec<Launch> {
    let before: Vec<Vec<usize>> = (0..pieces.len())
        .map(|later| {
            (0..later)
                .filter(|earlier| conflict(&pieces[*earlier].accesses, &pieces[later].accesses))
                .collect()
        })
        .collect();
    let mut done = vec![false; pieces.len()];
    let mut first = 0;
    let mut launches = Vec::new();
    while first < pieces.len() {
        let taken = next(&pieces, &before, &done, first, capacity);
        for index in &taken {
            done[*index] = true;
        }
        while first < pieces.len() && done[first] {
            first += 1;
        }
        launches.push(launch(&pieces, &taken));
    }
    barriers(&mut launches);
    launches
}

/// How far ahead of the first piece that is left a dispatch may reach.
const WINDOW: usize = 64;

/// The pieces of the next dispatch. Chains wait until nothing else is ready, so that they are long.
fn next(
    pieces: &[Piece],
    before: &[Vec<usize>],
    done: &[bool],
    first: usize,
    capacity: &Capacity,
) -> Vec<usize> {
    let window = first..pieces.len().min(first + WINDOW);
    let ready = |index: &usize| !done[*index] && before[*index].iter().all(|earlier| done[*earlier]);
    let is_row = |index: &usize| matches!(pieces[*index].kind, Kind::Row { .. });
    // The first that is left waits for nothing.
    let lead = window.clone().find(|index| !is_row(index) && ready(index)).unwrap_or(first);
    let mut taken = vec![lead];
    for index in window {
        if done[index] || index == lead || taken.len() == MOST {
            continue;
        }
        let goes = match (&pieces[lead].kind, &pieces[index].kind) {
            (Kind::Row { extent: a, .. }, Kind::Row { extent: b, .. }) => {
                let one_row = is_one_row(a, capacity);
                a == b
                    && before[index].iter().all(|earlier| done[*earlier] || taken.contains(earlier))
                    && taken
                        .iter()
                        .all(|link| chains(&pieces[*link].accesses, &pieces[index].accesses, one_row))
            }
            // A step without outputs has no groups of those: what has others must not share their count.
            (Kind::Product { shader: a, job: x, .. }, Kind::Product { shader: b, job: y, .. }) => {
                a == b && x.extent == y.extent && ready(&index)
            }
            _ => false,
        };
        if goes {
            taken.push(index);
        }
    }
    taken
}

fn is_one_row(extent: &Extent, capacity: &Capacity) -> bool {
    match extent {
        Extent::Fixed(n) => *n == 1,
        Extent::Rows => capacity.rows == 1,
        Extent::Outputs => capacity.outputs == 1,
    }
}

fn launch(pieces: &[Piece], taken: &[usize]) -> Launch {
    let mut groups = 0;
    let (mut links, mut jobs, mut all_tiles) = (Vec::new(), Vec::new(), Vec::new());
    for index in taken {
        match &pieces[*index].kind {
            Kind::Row { op, .. } => links.push(*op),
            Kind::Product { job, batches, tile_rows, tiles, .. } => {
                jobs.push(ProductJob { first_group: groups, ..*job });
                groups += batches * job.m.div_ceil(*tile_rows);
                all_tiles.push(*tiles);
            }
            Kind::Alone { .. } => {}
        }
    }
    let task = match &pieces[taken[0]].kind {
        Kind::Row { extent, .. } => Task::Rows { ops: links, extent: *extent },
        Kind::Product { shader, .. } => {
            Task::Products { shader: shader.clone(), jobs, groups, tiles: all_tiles }
        }
        Kind::Alone { shader, push, groups, cut, .. } => {
            Task::Alone { shader: shader.clone(), push: push.clone(), groups: *groups, cut: *cut }
        }
    };
    let helps = matches!(pieces[taken[0]].kind, Kind::Alone { helps: true, .. });
    let ops = taken.iter().map(|index| pieces[*index].op).collect();
    let touched = |index: &usize| (pieces[*index].op, pieces[*index].accesses.clone());
    let accesses = taken.iter().map(touched).collect();
    Launch { task, ops, helps, waits: false, accesses }
}

/// Two operations that clash and come in the other order, or without a barrier between them: found the slow way, from the
/// dispatches alone.
pub(crate) fn unordered(launches: &[Launch], capacity: &Capacity) -> Option<(usize, usize)> {
    let mut all: Vec<(usize, usize, &[Access])> = Vec::new();
    for (number, launch) in launches.iter().enumerate() {
        all.extend(launch.accesses.iter().map(|(op, own)| (number, *op, own.as_slice())));
    }
    let ordered = |earlier: &(usize, usize, &[Access]), later: &(usize, usize, &[Access])| {
        let waits = launches[earlier.0 + 1..=later.0].iter().any(|launch| launch.waits);
        let chained = match &launches[later.0].task {
            Task::Rows { extent, .. } => {
                earlier.0 == later.0 && chains(earlier.2, later.2, is_one_row(extent, capacity))
            }
            _ => false,
        };
        !conflict(earlier.2, later.2) || (earlier.1 <= later.1 && (waits || chained))
    };
    for (index, later) in all.iter().enumerate() {
        if let Some(earlier) = all[..index].iter().find(|earlier| !ordered(earlier, later)) {
            return Some((earlier.1, later.1));
        }
    }
    None
}

/// A barrier where a dispatch clashes with one since the last barrier.
fn barriers(launches: &mut [Launch]) {
    let mut open: Vec<Access> = Vec::new();
    for launch in launches {
        launch.waits = launch.accesses.iter().any(|(_, own)| conflict(&open, own));
        if launch.waits {
            open.clear();
        }
        open.extend(launch.accesses.iter().flat_map(|(_, own)| own.iter().cloned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lower::RowSpan,
        shared::{EXTENT_OUTPUTS, EXTENT_ROWS},
    };

    const MANY: Capacity = Capacity { rows: 8, outputs: 8, kv_len: 8 };

    fn touch(start: u64, rows: Option<(u64, u64)>, write: bool) -> Access {
        let (stride, size) = rows.unwrap_or((0, 64));
        let end = start + stride * 7 + size;
        Access { span: start..end, write, rows: rows.map(|_| RowSpan { stride, size }) }
    }

    fn row(op: usize, accesses: Vec<Access>) -> Piece {
        Piece { op, kind: Kind::Row { op: RowOp::default(), extent: Extent::Rows }, accesses }
    }

    fn product(op: usize, accesses: Vec<Access>) -> Piece {
        let shader = Shader::simple("p", 8);
        let job = ProductJob { m: 20, ..ProductJob::default() };
        let kind = Kind::Product { shader, job, batches: 1, tile_rows: 8, tiles: Count::Fixed(1) };
        Piece { op, kind, accesses }
    }

    fn ops(launches: &[Launch]) -> Vec<(Vec<usize>, bool)> {
        launches.iter().map(|launch| (launch.ops.clone(), launch.waits)).collect()
    }

    #[test]
    fn rows_that_keep_to_themselves_are_chained() {
        let r = |start, write| touch(start, Some((16, 16)), write);
        let pieces = vec![
            row(0, vec![r(0, false), r(1000, true)]),
            row(1, vec![r(1000, false), r(2000, true)]),
            // Over the first one's input, row by row.
            row(2, vec![r(2000, false), r(0, true)]),
        ];
        assert_eq!(ops(&schedule(pieces, &MANY)), [(vec![0, 1, 2], false)]);
    }

    #[test]
    fn rows_that_lie_elsewhere_are_not() {
        // The second writes rows of another width over what other rows of the first still read.
        let pieces = || {
            vec![
                row(0, vec![touch(0, Some((16, 16)), false), touch(1000, Some((16, 16)), true)]),
                row(1, vec![touch(1000, Some((16, 16)), false), touch(0, Some((32, 32)), true)]),
            ]
        };
        assert_eq!(ops(&schedule(pieces(), &MANY)), [(vec![0], false), (vec![1], true)]);
        // A single row runs in order.
        let one = Capacity { rows: 1, ..MANY };
        assert_eq!(ops(&schedule(pieces(), &one)), [(vec![0, 1], false)]);
    }

    #[test]
    fn products_that_wait_for_nothing_share_a_dispatch() {
        let pieces = vec![
            product(0, vec![touch(0, None, false), touch(1000, None, true)]),
            row(1, vec![touch(1000, None, false), touch(2000, None, true)]),
            product(2, vec![touch(0, None, false), touch(3000, None, true)]),
            product(3, vec![touch(2000, None, false), touch(4000, None, true)]),
        ];
        let launches = schedule(pieces, &MANY);
        assert_eq!(ops(&launches), [(vec![0, 2], false), (vec![1], true), (vec![3], true)]);
        let Task::Products { jobs, groups, .. } = &launches[0].task else { panic!("{launches:?}") };
        assert_eq!((jobs[0].first_group, jobs[1].first_group, *groups), (0, 3, 6));
    }

    #[test]
    fn products_of_rows_and_of_outputs_share_none() {
        let mut pieces: Vec<Piece> =
            (0..3).map(|op| product(op, vec![touch(1000 * op as u64, None, true)])).collect();
        for (piece, of_piece) in pieces.iter_mut().zip([EXTENT_OUTPUTS, EXTENT_ROWS, EXTENT_OUTPUTS]) {
            if let Kind::Product { job, .. } = &mut piece.kind {
                job.extent = of_piece;
            }
        }
        assert_eq!(ops(&schedule(pieces, &MANY)), [(vec![0, 2], false), (vec![1], false)]);
    }

    #[test]
    fn a_write_waits_for_the_readers_of_what_was_there() {
        let pieces = vec![
            product(0, vec![touch(0, None, false), touch(1000, None, true)]),
            product(1, vec![touch(5000, None, false), touch(0, None, true)]),
            product(2, vec![touch(0, None, false), touch(6000, None, true)]),
        ];
        assert_eq!(ops(&schedule(pieces, &MANY)), [(vec![0], false), (vec![1], true), (vec![2], true)]);
    }
    #[test]
    fn a_missing_barrier_and_a_wrong_order_are_found() {
        let pieces = || {
            vec![
                product(0, vec![touch(0, None, false), touch(1000, None, true)]),
                product(1, vec![touch(5000, None, false), touch(6000, None, true)]),
                row(2, vec![touch(1000, None, false), touch(2000, None, true)]),
                product(3, vec![touch(2000, None, false), touch(1000, None, true)]),
            ]
        };
        let launches = schedule(pieces(), &MANY);
        assert_eq!(ops(&launches), [(vec![0, 1], false), (vec![2], true), (vec![3], true)]);
        assert_eq!(unordered(&launches, &MANY), None);
        for (barrier, pair) in [(1, (0, 2)), (2, (2, 3))] {
            let mut without = launches.clone();
            without[barrier].waits = false;
            assert_eq!(unordered(&without, &MANY), Some(pair));
        }
        // One of a dispatch's products overtakes what it clashes with, or is put beside it.
        let ahead = |ops: [usize; 2]| {
            let mut all = pieces();
            all.push(product(5, vec![touch(9000, None, true)]));
            let taken = ops.map(|op| all.iter().position(|piece| piece.op == op).expect("one of them"));
            launch(&all, &taken)
        };
        assert_eq!(unordered(&[ahead([0, 3])], &MANY), Some((0, 3)));
        assert_eq!(unordered(&[ahead([0, 5])], &MANY), None);
        let mut late = launches[1].clone();
        late.waits = true;
        assert_eq!(unordered(&[ahead([5, 3]), late], &MANY), Some((3, 2)));
        let mut swapped = launches;
        swapped.swap(1, 2);
        assert_eq!(unordered(&swapped, &MANY), Some((3, 2)));
    }
}
