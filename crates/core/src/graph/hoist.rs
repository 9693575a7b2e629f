//! Moving ops that were appended last to where their operands are ready.

use std::collections::HashMap;

use super::{Graph, Node, TensorId};

impl Graph {
    /// Moves each op from number `first` on to just behind the last op before it that reads or writes the memory of one
    /// of its operands: as early as nothing can tell. Those that stop at the same place keep their order.
    ///
    /// What is added to gradients then runs, and frees memory, as the gradients come and not after the last of them.
    /// Regions are forgotten.
    pub fn hoist(&mut self, first: usize) {
        let mut touched = HashMap::new();
        for (i, node) in self.nodes[..first].iter().enumerate() {
            touched.extend(self.memory(node).map(|t| (t, i)));
        }
        // For each op that moves: how many ops of the others come before it.
        let mut moved: Vec<(usize, Node)> = Vec::new();
        for node in self.nodes[first..].iter() {
            let last = self.memory(node).filter_map(|t| touched.get(&t)).max().copied();
            touched.extend(self.memory(node).filter_map(|t| last.map(|last| (t, last))));
            moved.push((last.map_or(0, |last| last + 1), node.clone()));
        }
        moved.sort_by_key(|(before, _)| *before);
        let mut moved = moved.into_iter().peekable();
        let mut nodes = Vec::with_capacity(self.nodes.len());
        for (i, node) in self.nodes.drain(..).take(first).enumerate() {
            while let Some((_, early)) = moved.next_if(|(before, _)| *before <= i) {
                nodes.push(early);
            }
            nodes.push(node);
        }
        nodes.extend(moved.map(|(_, node)| node));
        self.nodes = nodes;
        self.regions.clear();
    }

    /// The number of the last op that reads or writes the memory of a tensor.
    pub fn last_touch(&self, t: TensorId) -> Option<usize> {
        let root = self.root(t).0;
        self.nodes.iter().rposition(|node| self.memory(node).any(|t| t == root))
    }

    /// The tensors in whose memory the operands of an op lie.
    fn memory<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = TensorId> + 'a {
        node.inputs.iter().chain(&node.outputs).flatten().map(|&t| self.root(t).0)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::elementwise;
    use crate::{DType, Graph};

    #[test]
    fn ops_move_to_where_their_operands_are_ready_and_not_before() {
        let mut g = Graph::new();
        let [x, a, b] = ["x", "a", "b"].map(|name| g.external(name, DType::F32, 1, 4));
        let early = elementwise::scale(&mut g, x, 2.0).unwrap();
        let late = elementwise::scale(&mut g, early, 3.0).unwrap();
        let last = elementwise::scale(&mut g, late, 4.0).unwrap();
        g.output("y", last).unwrap();
        let first = g.nodes().len();
        // Adds to what is in a and b, b from the value that is ready later, then uses the new b.
        let sum = elementwise::add(&mut g, late, b).unwrap();
        let sum = g.store(sum, b).unwrap();
        let constant = elementwise::fill(&mut g, DType::F32, 1, 4, 1.0).unwrap();
        g.store(constant, a).unwrap();
        g.output("z", sum).unwrap();
        let names = |g: &Graph| g.nodes().iter().map(|n| n.op.name()).collect::<Vec<_>>();
        let before = names(&g);
        g.hoist(first);
        let after = names(&g);
        assert_eq!(before.len(), after.len());
        // `late` is read by the op that makes `last`: the sum follows that one, as its copy does.
        assert_eq!(after[0], before[first + 1], "a constant waits for nothing");
        assert_eq!(after[4], "add", "{after:?}");
        assert_eq!(g.last_touch(sum), Some(after.len() - 1));
    }
}
