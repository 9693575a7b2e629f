//! The backward transformation: gradients as further ops of the same graph (reverse-mode differentiation).

use std::collections::{HashMap, HashSet};

use super::{Graph, Node, Place, TensorId};
use crate::error::Error;
use crate::ops::elementwise;

/// How much of the forward pass is written again in the backward pass instead of being kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Keep every activation that a gradient needs: fastest, most memory.
    #[default]
    Nothing,
    /// Recompute the results of ops that cost little beside their memory ([`super::Op::is_cheap`]).
    Cheap,
    /// Recompute the first `n` regions (layers) from their inputs; the last ones are used again soonest.
    Regions(usize),
    /// Recompute every region.
    All,
}

impl Graph {
    /// Appends the ops that compute the gradients of `Σ seed · value` over the `seeds` (value, gradient) with respect
    /// to the tensors `wrt`. `None` where nothing flows back to a tensor.
    ///
    /// With [`Recompute`], a region's forward ops are appended again before its gradients, so its intermediate tensors
    /// need not live through the rest of the forward and backward pass.
    pub fn backward(
        &mut self,
        seeds: &[(TensorId, TensorId)],
        wrt: &[TensorId],
        recompute: Recompute,
    ) -> Result<Vec<Option<TensorId>>, Error> {
        self.end_region();
        let needs = self.needs_gradient(wrt);
        let mut gradients: HashMap<TensorId, TensorId> = HashMap::new();
        for &(value, seed) in seeds {
            self.accumulate(&mut gradients, value, seed)?;
        }
        let regions = match recompute {
            Recompute::Nothing | Recompute::Cheap => Vec::new(),
            Recompute::Regions(n) => self.regions[..n.min(self.regions.len())].to_vec(),
            Recompute::All => self.regions.clone(),
        };
        let mut again = (recompute == Recompute::Cheap).then(|| Again::new(self));
        let mut end = self.nodes.len();
        while end > 0 {
            let region = regions.iter().find(|r| r.end == end && !r.is_empty());
            let start = region.map_or(end - 1, |r| r.start);
            // The nodes to differentiate: the recorded ones, or copies of them appended now.
            let nodes = match region {
                Some(r) if self.nodes[r.clone()].iter().any(|n| has_gradient(n, &gradients)) => {
                    self.repeat(r.clone(), &mut gradients)
                }
                _ => self.nodes[start..end].iter().map(|n| (n.clone(), n.clone())).collect(),
            };
            for (original, node) in nodes.iter().rev() {
                if has_gradient(node, &gradients) {
                    self.differentiate(original, node, &needs, &mut gradients, &mut again)?;
                }
            }
            end = start;
        }
        Ok(wrt.iter().map(|t| gradients.get(t).copied()).collect())
    }

    /// The tensors through which a gradient can flow to one of `wrt`.
    fn needs_gradient(&self, wrt: &[TensorId]) -> HashSet<TensorId> {
        let mut needs: HashSet<TensorId> = wrt.iter().copied().collect();
        for node in &self.nodes {
            if node.inputs.iter().flatten().any(|t| needs.contains(t)) {
                needs.extend(node.outputs.iter().flatten());
            }
        }
        needs
    }

    fn differentiate(
        &mut self,
        original: &Node,
        node: &Node,
        needs: &HashSet<TensorId>,
        gradients: &mut HashMap<TensorId, TensorId>,
        again: &mut Option<Again>,
    ) -> Result<(), Error> {
        let wanted: Vec<bool> = original.inputs.iter().map(|t| t.is_some_and(|t| needs.contains(&t))).collect();
        if !wanted.contains(&true) {
            return Ok(());
        }
        let d_outputs: Vec<_> = node.outputs.iter().map(|t| t.and_then(|t| gradients.get(&t).copied())).collect();
        let mut reads = node.clone();
        if let Some(again) = again {
            reads.inputs.iter_mut().flatten().for_each(|t| *t = self.made_again(*t, again).unwrap_or(*t));
        }
        let d_inputs = node.op.backward(self, &reads, &d_outputs, &wanted)?;
        for ((input, gradient), wanted) in node.inputs.iter().zip(d_inputs).zip(wanted) {
            if let (Some(input), Some(gradient), true) = (input, gradient, wanted) {
                self.accumulate(gradients, *input, gradient)?;
            }
        }
        Ok(())
    }

    /// A copy of `t` if a cheap op made it, or it is part of such a tensor: that op is appended again, once.
    fn made_again(&mut self, t: TensorId, again: &mut Again) -> Option<TensorId> {
        if let Some(&copy) = again.copies.get(&t) {
            return Some(copy);
        }
        let original = again.makers.get(&t)?.clone();
        let mut copy = original.clone();
        let mut changed = false;
        for input in copy.inputs.iter_mut().flatten() {
            if let Some(made) = self.made_again(*input, again) {
                *input = made;
                changed = true;
            }
        }
        let is_split = original.op.is_placement();
        if is_split && !changed {
            return None;
        }
        let inside: HashSet<TensorId> = again.copies.keys().chain(original.outputs.iter().flatten()).copied().collect();
        for output in copy.outputs.iter_mut().flatten() {
            *output = self.copy_tensor(*output, is_split, &inside, &mut again.copies);
        }
        self.nodes.push(copy);
        again.copies.get(&t).copied()
    }

    fn accumulate(
        &mut self,
        gradients: &mut HashMap<TensorId, TensorId>,
        of: TensorId,
        gradient: TensorId,
    ) -> Result<(), Error> {
        let sum = match gradients.get(&of).copied() {
            // A tensor that is the gradient of something else, too, must stay what it is.
            Some(sum) if gradients.values().any(|&t| t == gradient) => elementwise::add(self, sum, gradient)?,
            Some(sum) => self.plus(gradient, sum)?,
            None => gradient,
        };
        gradients.insert(of, sum);
        Ok(())
    }

    /// t + start. Where the op that makes t can start from a given value and nobody reads t by itself, that op makes the
    /// sum in its place: one pass over memory instead of two.
    ///
    /// # Errors
    /// Other shapes or types.
    pub fn plus(&mut self, t: TensorId, start: TensorId) -> Result<TensorId, Error> {
        let (a, b) = (self.tensor(t), self.tensor(start));
        let alike = (a.rows, a.cols, a.dtype) == (b.rows, b.cols, b.dtype);
        let makes = |n: &Node, t| n.outputs.contains(&Some(t));
        if let Some(maker) = self.nodes.iter().rposition(|n| makes(n, t))
            && let Some(place) = self.nodes[maker].op.start_input()
        {
            let later = &self.nodes[maker..];
            let given = self.nodes[maker].inputs.get(place).is_some_and(Option::is_some);
            let read = later.iter().any(|n| n.inputs.contains(&Some(t)));
            if alike && !given && !read && !later.iter().any(|n| makes(n, start)) {
                let inputs = &mut self.nodes[maker].inputs;
                inputs.resize(inputs.len().max(place + 1), None);
                inputs[place] = Some(start);
                return Ok(t);
            }
        }
        elementwise::add(self, start, t)
    }

    /// Appends a copy of the nodes of a region that makes new tensors from the region's inputs. Gradients known so far
    /// for the region's tensors move to their copies. Returns (original, copy) of each node.
    fn repeat(
        &mut self,
        region: std::ops::Range<usize>,
        gradients: &mut HashMap<TensorId, TensorId>,
    ) -> Vec<(Node, Node)> {
        let inside: HashSet<TensorId> =
            self.nodes[region.clone()].iter().flat_map(|n| n.outputs.iter().flatten().copied()).collect();
        let mut copies: HashMap<TensorId, TensorId> = HashMap::new();
        let mut nodes = Vec::with_capacity(region.len());
        for i in region {
            let original = self.nodes[i].clone();
            let mut copy = original.clone();
            for input in copy.inputs.iter_mut().flatten() {
                *input = copies.get(input).copied().unwrap_or(*input);
            }
            for output in copy.outputs.iter_mut().flatten() {
                *output = self.copy_tensor(*output, original.op.is_placement(), &inside, &mut copies);
            }
            self.nodes.push(copy.clone());
            nodes.push((original, copy));
        }
        for (original, copy) in &copies {
            if let Some(gradient) = gradients.remove(original) {
                gradients.insert(*copy, gradient);
            }
        }
        nodes
    }

    /// A tensor like `t` for the repeated op that makes it again. Columns of a tensor of the region become columns of
    /// that tensor's copy, a split of a tensor from outside stays one, and a value that was stored somewhere outside
    /// goes to the arena instead.
    fn copy_tensor(
        &mut self,
        t: TensorId,
        is_split: bool,
        inside: &HashSet<TensorId>,
        copies: &mut HashMap<TensorId, TensorId>,
    ) -> TensorId {
        if let Some(&copy) = copies.get(&t) {
            return copy;
        }
        let mut tensor = self.tensor(t).clone();
        tensor.place = match tensor.place {
            Place::View { of, col } if inside.contains(&of) => {
                Place::View { of: self.copy_tensor(of, is_split, inside, copies), col }
            }
            view @ Place::View { .. } if is_split => view,
            _ => Place::Arena,
        };
        let copy = self.add_tensor(tensor);
        copies.insert(t, copy);
        copy
    }
}

/// The ops that [`Recompute::Cheap`] computes again, by what they made, and what was made again so far.
struct Again {
    makers: HashMap<TensorId, Node>,
    copies: HashMap<TensorId, TensorId>,
}

impl Again {
    fn new(graph: &Graph) -> Again {
        let mut makers = HashMap::new();
        for node in &graph.nodes {
            let is_split = node.op.is_placement() && node.inputs.len() == 1;
            if is_split || node.op.is_cheap(graph, node) {
                makers.extend(node.outputs.iter().flatten().map(|&t| (t, node.clone())));
            }
        }
        Again { makers, copies: HashMap::new() }
    }
}

fn has_gradient(node: &Node, gradients: &HashMap<TensorId, TensorId>) -> bool {
    node.outputs.iter().flatten().any(|t| gradients.contains_key(t))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
    use crate::ops::layout::split;
    use crate::ops::linear::linear;
    use crate::ops::testing::{Case, Value};

    /// Layers of convolution, split and products; the gradients of the weights and the number of convolutions.
    fn layers(recompute: Recompute) -> (Case, usize) {
        let (tokens, width) = (64, 12);
        let mut case = Case::new();
        let mut x = case.input("x", &Value::random(tokens, width, 1));
        let segments = case.input("segments", &Value::ints(&[0, 40, 64]));
        let mut wrt = Vec::new();
        for layer in 0..4 {
            let weight = case.input("conv", &Value::random(width, 3, 10 + layer));
            let out = case.input("out", &Value::random(width, 6, 20 + layer));
            wrt.extend([weight, out]);
            let conv = CausalConv1d { x, weight, bias: None, initial_state: None, segments, silu: true };
            let y = causal_conv1d(&mut case.graph, conv).unwrap().y;
            let parts = split(&mut case.graph, y, &[6, 6]).unwrap();
            let sum = crate::ops::elementwise::mul(&mut case.graph, parts[0], parts[1]).unwrap();
            x = linear(&mut case.graph, sum, out, None).unwrap();
        }
        let seed = case.input("seed", &Value::random(tokens, width, 2));
        for (i, gradient) in case.graph.backward(&[(x, seed)], &wrt, recompute).unwrap().into_iter().enumerate() {
            case.output(&format!("gradient {i}"), gradient.unwrap());
        }
        let convolutions = case.graph.nodes().iter().filter(|n| n.op.name() == "causal_conv1d").count();
        (case, convolutions)
    }

    #[test]
    fn cheap_ops_are_computed_again_with_the_same_bits() {
        let ((kept, once), (again, twice)) = (layers(Recompute::Nothing), layers(Recompute::Cheap));
        assert_eq!((once, twice), (4, 8));
        assert_eq!(kept.run(), again.run());
    }
}
