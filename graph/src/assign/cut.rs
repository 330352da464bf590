//! Minimum cuts: the cheapest way to divide nodes between two sides.

use std::collections::VecDeque;

/// A network of nodes and capacities; nodes 0 and 1 are its source and its sink.
#[derive(Debug, Default)]
pub(super) struct Network {
    edges: Vec<Edge>,
    /// Indices into `edges` of those that leave each node.
    leaving: Vec<Vec<usize>>,
}

#[derive(Debug)]
struct Edge {
    to: usize,
    left: u128,
}

/// More than any sum of costs.
pub(super) const NEVER: u128 = u128::MAX / 4;

pub(super) const SOURCE: usize = 0;
pub(super) const SINK: usize = 1;

impl Network {
    /// Source, sink and `nodes` more, numbered from 2.
    pub(super) fn new(nodes: usize) -> Self {
        Network { edges: Vec::new(), leaving: vec![Vec::new(); nodes + 2] }
    }

    /// One more node.
    pub(super) fn add(&mut self) -> usize {
        self.leaving.push(Vec::new());
        self.leaving.len() - 1
    }

    /// Costs `cost` when `from` is on the source's side and `to` on the sink's.
    pub(super) fn edge(&mut self, from: usize, to: usize, cost: u128) {
        if from == to || cost == 0 {
            return;
        }
        // An edge and its reverse are neighbours, so that `index ^ 1` is the other.
        self.leaving[from].push(self.edges.len());
        self.edges.push(Edge { to, left: cost });
        self.leaving[to].push(self.edges.len());
        self.edges.push(Edge { to: from, left: 0 });
    }

    /// Whether each node is on the source's side of a cheapest cut (Edmonds and Karp 1972: shortest augmenting
    /// paths).
    pub(super) fn cut(mut self) -> Vec<bool> {
        loop {
            let (reached, path) = self.search();
            let Some(path) = path else { return reached };
            let flow = path.iter().map(|&edge| self.edges[edge].left).min().unwrap_or(0);
            for edge in path {
                self.edges[edge].left -= flow;
                self.edges[edge ^ 1].left += flow;
            }
        }
    }

    /// What the source reaches, and the edges of a shortest path to the sink.
    fn search(&self) -> (Vec<bool>, Option<Vec<usize>>) {
        let mut came_by = vec![None; self.leaving.len()];
        let mut reached = vec![false; self.leaving.len()];
        reached[SOURCE] = true;
        let mut queue = VecDeque::from([SOURCE]);
        while let Some(node) = queue.pop_front() {
            for &edge in &self.leaving[node] {
                let Edge { to, left } = self.edges[edge];
                if left == 0 || reached[to] {
                    continue;
                }
                reached[to] = true;
                came_by[to] = Some(edge);
                queue.push_back(to);
            }
        }
        if !reached[SINK] {
            return (reached, None);
        }
        let mut path = Vec::new();
        let mut node = SINK;
        while let Some(edge) = came_by[node] {
            path.push(edge);
            node = self.edges[edge ^ 1].to;
        }
        (reached, Some(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Costs of all divisions of a small network, by trying them.
    fn cheapest(nodes: usize, edges: &[(usize, usize, u128)]) -> u128 {
        let side = |mask: usize, node: usize| node == SOURCE || (node > 1 && mask >> (node - 2) & 1 == 1);
        let cost = |mask| {
            edges.iter().filter(|(a, b, _)| side(mask, *a) && !side(mask, *b)).map(|e| e.2).sum::<u128>()
        };
        (0..1 << nodes).map(cost).min().unwrap_or(0)
    }

    proptest::proptest! {
        #[test]
        fn no_division_is_cheaper(
            edges in proptest::collection::vec((0usize..7, 0usize..7, 0u128..20), 0..25)
        ) {
            let mut network = Network::new(5);
            let edges: Vec<_> = edges.into_iter().filter(|(a, b, _)| a != b).collect();
            for &(from, to, cost) in &edges {
                network.edge(from, to, cost);
            }
            let side = network.cut();
            let cost: u128 = edges.iter().filter(|(a, b, _)| side[*a] && !side[*b]).map(|e| e.2).sum();
            proptest::prop_assert!(side[SOURCE] && !side[SINK]);
            proptest::prop_assert_eq!(cost, cheapest(5, &edges));
        }
    }
}
