//! The cases: every operation × format × shape, from below to above every block and tile.

mod attention;
mod products;
mod programs;
mod routing;
mod rows;

use crate::setup::Builder;
use backend_api::{Extent, Shape};

/// Something to run. Its data come from its name alone.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) build: Box<dyn Fn(&mut Builder<'_>)>,
}

/// Row counts below, at and above what tiles and vectors hold.
const ROWS: [usize; 10] = [1, 2, 3, 4, 5, 8, 9, 16, 33, 70];

pub(crate) fn all() -> Vec<Case> {
    let mut cases = Cases::default();
    products::add(&mut cases);
    attention::add(&mut cases);
    routing::add(&mut cases);
    rows::add(&mut cases);
    programs::add(&mut cases);
    cases.0
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn add(&mut self, name: String, build: impl Fn(&mut Builder<'_>) + 'static) {
        self.0.push(Case { name, build: Box::new(build) });
    }
}

/// Where a case's outermost extent comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outer {
    Rows,
    Outputs,
    Fixed,
}

impl Outer {
    /// The step in which it is `n`, and its extent.
    fn set(self, b: &mut Builder<'_>, n: usize) -> Extent {
        match self {
            Outer::Rows => {
                b.step(n, 0, 1);
                Extent::Rows
            }
            Outer::Outputs => {
                b.step(n + 3, 0, n);
                Extent::Outputs
            }
            Outer::Fixed => {
                b.step(2, 0, 1);
                Extent::Fixed(n)
            }
        }
    }
}

/// `[outer, rest…]`.
fn shape(outer: Extent, rest: &[usize]) -> Shape {
    let extents: Vec<Extent> = std::iter::once(outer).chain(rest.iter().map(|n| (*n).into())).collect();
    Shape::new(&extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend_api::{DType, OpKind};
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        let cases = all();
        let names: HashSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len());
    }

    #[test]
    fn every_operation_and_every_format_of_its_weights_has_cases() {
        let cases = all();
        let some = |start: &str| cases.iter().any(|case| case.name.starts_with(start));
        for op in OpKind::ALL {
            assert!(some(&format!("{op} ")), "{op}");
        }
        for op in [OpKind::EmbedRows, OpKind::MatMul, OpKind::HeadMatMul, OpKind::ExpertMatMul] {
            for dtype in DType::WEIGHTS {
                assert!(some(&format!("{op} {dtype} ")), "{op} of {dtype}");
            }
        }
    }
}
