//! The plan: which ops run, and where every tensor lives in one arena.
//!
//! The peak is known before anything runs. Offsets depend on the graph only, so a captured run can be replayed.

use std::collections::{HashMap, HashSet};

use crate::cpu::Cpu;
use crate::cuda::replay::Captured;
use crate::cuda::{Launcher, Properties, Variant};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Cost, Graph, Io, Mat, Node, Place, TensorId};

/// Alignment of every tensor in the arena, in bytes: a cache line, and the widest vector.
pub const ALIGNMENT: usize = 64;

/// A graph with a place for every tensor.
#[derive(Debug)]
pub struct Plan {
    graph: Graph,
    /// Indices of the nodes that run, in order.
    order: Vec<usize>,
    /// Byte offsets of the tensors that have storage of their own in the arena.
    offsets: HashMap<TensorId, usize>,
    /// Byte offset and length of each running node's scratch memory.
    scratch: Vec<(usize, usize)>,
    /// Outputs that nobody reads: their ops need not compute them.
    unread: HashSet<TensorId>,
    arena_bytes: usize,
    sum_bytes: usize,
    /// Runs on a GPU that can be replayed.
    captured: Captured,
}

/// What a plan's scratch memory is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    Cpu(&'a Cpu),
    Cuda(&'a Properties),
}

/// A block of memory with the first and last step that needs it.
struct Block {
    bytes: usize,
    first: usize,
    last: usize,
}

impl Plan {
    /// The plan for a GPU with these properties, which need not be here: to know its kernels and its memory.
    ///
    /// # Errors
    /// As [`Device::plan`](crate::Device::plan).
    pub fn for_gpu(graph: Graph, gpu: &Properties) -> Result<Plan, Error> {
        Plan::new(graph, Target::Cuda(gpu))
    }

    /// Drops ops whose results nobody reads, then places every tensor and every op's scratch memory.
    pub(crate) fn new(graph: Graph, target: Target<'_>) -> Result<Plan, Error> {
        let order = live_nodes(&graph);
        check_stores(&graph, &order)?;
        if matches!(target, Target::Cpu(_)) {
            check_types(&graph, &order)?;
        }
        let unread = unread_outputs(&graph, &order);
        let mut blocks: Vec<Block> = Vec::new();
        let mut block_of: HashMap<TensorId, usize> = HashMap::new();
        let mut scratch_blocks = Vec::with_capacity(order.len());
        for (step, &i) in order.iter().enumerate() {
            let node = &graph.nodes[i];
            for &t in node.inputs.iter().chain(&node.outputs).flatten() {
                let root = graph.root(t).0;
                if graph.tensor(root).place != Place::Arena || unread.contains(&t) {
                    continue;
                }
                let block = *block_of.entry(root).or_insert_with(|| {
                    blocks.push(Block { bytes: round_up(graph.tensor(root).bytes()), first: step, last: step });
                    blocks.len() - 1
                });
                blocks[block].last = step;
            }
            let bytes = round_up(match target {
                Target::Cpu(cpu) => node.op.workspace(&graph, node, cpu),
                Target::Cuda(gpu) => node.op.workspace_cuda(&graph, node, gpu),
            });
            scratch_blocks.push(blocks.len());
            blocks.push(Block { bytes, first: step, last: step });
        }
        let (placed, arena_bytes) = place(&blocks);
        let offsets = block_of.into_iter().map(|(t, b)| (t, placed[b])).collect();
        let scratch = scratch_blocks.into_iter().map(|b| (placed[b], blocks[b].bytes)).collect();
        let sum_bytes = blocks.iter().map(|b| b.bytes).sum();
        Ok(Plan { graph, order, offsets, scratch, unread, arena_bytes, sum_bytes, captured: Captured::default() })
    }

    /// Bytes of the arena: the peak of all intermediate tensors and scratch memory.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Bytes that all intermediate tensors would need without sharing.
    pub fn unshared_bytes(&self) -> usize {
        self.sum_bytes
    }

    pub(crate) fn captured(&self) -> &Captured {
        &self.captured
    }

    /// The graph that was planned.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Work and traffic of one run.
    pub fn cost(&self) -> Cost {
        let mut sum = Cost::default();
        for &i in &self.order {
            sum += self.graph.cost(&self.graph.nodes[i]);
        }
        sum
    }

    /// Runs every op on the CPU. `externals[i]` is the memory bound to external `i`; `arena` has at least
    /// [`Plan::arena_bytes`] bytes.
    ///
    /// # Safety
    /// Every external is valid memory of its tensor's size, and no two of them overlap.
    pub(crate) unsafe fn run_cpu(&self, cpu: &Cpu, arena: *mut u8, externals: &[*mut u8]) {
        self.each(arena, externals, |node, io| node.op.run_cpu(io, cpu));
    }

    /// Hands the kernels of every op to a launcher, which may merely collect them.
    ///
    /// # Errors
    /// An op without kernels, or what the driver refuses.
    pub(crate) fn run_cuda(
        &self,
        launcher: &mut Launcher<'_>,
        arena: *mut u8,
        externals: &[*mut u8],
    ) -> Result<(), Error> {
        let mut result = Ok(());
        self.each(arena, externals, |node, io| {
            if result.is_ok() {
                result = node.op.run_cuda(io, launcher);
            }
        });
        // A stream that was forked is joined whatever happened: else the capture that it is part of cannot end.
        let joined = launcher.join();
        result.and(joined)
    }

    /// The kernels that the plan needs on a GPU with these properties, which need not be here.
    ///
    /// # Errors
    /// An op without kernels.
    pub fn variants(&self, gpu: &Properties) -> Result<HashMap<String, Variant>, Error> {
        let mut launcher = Launcher::collect(gpu);
        // Addresses decide which variants are aligned enough: externals of a device always are.
        let externals = vec![std::ptr::null_mut::<u8>().wrapping_add(ALIGNMENT); self.graph.externals().len()];
        self.run_cuda(&mut launcher, std::ptr::null_mut::<u8>().wrapping_add(ALIGNMENT), &externals)?;
        Ok(launcher.variants())
    }

    /// Visits the ops that run, in order, with their operands.
    pub(crate) fn each(&self, arena: *mut u8, externals: &[*mut u8], mut visit: impl FnMut(&Node, &Io<'_>)) {
        let mut inputs = Vec::new();
        let mut outputs = Vec::new();
        for (&i, &(offset, bytes)) in self.order.iter().zip(&self.scratch) {
            let node = &self.graph.nodes[i];
            if node.op.is_placement() {
                continue;
            }
            inputs.clear();
            inputs.extend(node.inputs.iter().map(|t| t.map(|t| self.mat(t, arena, externals))));
            outputs.clear();
            let read = |t: &TensorId| !self.unread.contains(t);
            outputs.extend(node.outputs.iter().map(|t| t.filter(read).map(|t| self.mat(t, arena, externals))));
            let workspace = (arena.wrapping_add(offset), bytes);
            visit(node, &Io { name: node.op.name(), inputs: &inputs, outputs: &outputs, workspace });
        }
    }

    fn mat(&self, t: TensorId, arena: *mut u8, externals: &[*mut u8]) -> Mat {
        let (root, col) = self.graph.root(t);
        let base = self.graph.tensor(root);
        let ptr = match base.place {
            Place::External(i) => externals[i],
            _ => arena.wrapping_add(self.offsets.get(&root).copied().unwrap_or(0)),
        };
        let tensor = self.graph.tensor(t);
        Mat {
            // Weights have no views, and blocks no columns.
            ptr: if col == 0 { ptr } else { ptr.wrapping_add(col * base.dtype.size()) },
            rows: tensor.rows,
            cols: tensor.cols,
            stride: base.cols,
            dtype: tensor.dtype,
            layout: tensor.layout,
        }
    }
}

fn round_up(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Nodes whose results reach an external tensor, in order.
fn live_nodes(graph: &Graph) -> Vec<usize> {
    let mut wanted = vec![false; graph.tensors.len()];
    let mut order = Vec::new();
    let is_external = |t: TensorId| matches!(graph.tensor(graph.root(t).0).place, Place::External(_));
    for (i, node) in graph.nodes.iter().enumerate().rev() {
        let live =
            node.outputs.iter().flatten().any(|&t| wanted[t.index()] || is_external(t) && !reads_root(graph, node, t));
        if live {
            node.inputs.iter().flatten().for_each(|t| wanted[t.index()] = true);
            order.push(i);
        }
    }
    order.reverse();
    order
}

/// Outputs in the arena that no running op reads. Parts of a concatenation count as read: its reader reads them.
fn unread_outputs(graph: &Graph, order: &[usize]) -> HashSet<TensorId> {
    let nodes = || order.iter().map(|&i| &graph.nodes[i]);
    let read: HashSet<TensorId> = nodes().flat_map(|n| n.inputs.iter().flatten().copied()).collect();
    let outputs = nodes().flat_map(|n| n.outputs.iter().flatten().copied());
    outputs.filter(|t| graph.tensor(*t).place == Place::Arena && !read.contains(t)).collect()
}

/// Whether `t` is a mere part of one of the node's inputs (an output of a split), so that it writes nothing.
fn reads_root(graph: &Graph, node: &Node, t: TensorId) -> bool {
    node.op.is_placement() && node.inputs.iter().flatten().any(|&input| graph.root(input).0 == graph.root(t).0)
}

/// Refuses bf16 activations: kernels for the CPU read bf16 and blocks in weights only.
fn check_types(graph: &Graph, order: &[usize]) -> Result<(), Error> {
    for &i in order {
        let node = &graph.nodes[i];
        let inputs =
            node.inputs.iter().enumerate().filter(|(i, _)| node.op.narrow_weight() != Some(*i)).map(|(_, t)| t);
        let wide = |&t: &TensorId| matches!(graph.dtype(t), DType::F32 | DType::I32);
        if !inputs.chain(&node.outputs).flatten().all(wide) {
            let message = "on a CPU activations are f32; bf16 activations need a GPU".into();
            return Err(Error::Unsupported { op: node.op.name(), message });
        }
    }
    Ok(())
}

/// Refuses a graph in which an op reads an external's old value after a later value was stored over it.
fn check_stores(graph: &Graph, order: &[usize]) -> Result<(), Error> {
    let mut overwritten: HashMap<TensorId, &'static str> = HashMap::new();
    for &i in order {
        let node = &graph.nodes[i];
        for t in node.inputs.iter().flatten() {
            if let Some(writer) = overwritten.get(t) {
                let Place::External(e) = graph.tensor(*t).place else { continue };
                return Err(Error::Plan(format!(
                    "{} reads {} after {writer} has stored a new value over it; store the new value elsewhere",
                    node.op.name(),
                    graph.externals[e].name,
                )));
            }
        }
        for &t in node.outputs.iter().flatten() {
            let root = graph.root(t).0;
            if root != t && matches!(graph.tensor(root).place, Place::External(_)) && !reads_root(graph, node, t) {
                overwritten.insert(root, node.op.name());
            }
        }
    }
    Ok(())
}

/// Gives each block an offset so that blocks alive at the same time do not overlap: largest first, each into the
/// smallest gap that holds it.
fn place(blocks: &[Block]) -> (Vec<usize>, usize) {
    let mut by_size: Vec<usize> = (0..blocks.len()).collect();
    by_size.sort_by_key(|&b| (std::cmp::Reverse(blocks[b].bytes), blocks[b].first));
    let mut offsets = vec![0usize; blocks.len()];
    // Placed blocks, sorted by offset.
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for b in by_size {
        let block = &blocks[b];
        if block.bytes == 0 {
            continue;
        }
        let mut best: Option<(usize, usize)> = None;
        let mut end = 0;
        for &other in &placed {
            let o = &blocks[other];
            if o.first > block.last || o.last < block.first {
                continue;
            }
            if offsets[other] >= end + block.bytes {
                let gap = offsets[other] - end;
                if best.is_none_or(|(size, _)| gap < size) {
                    best = Some((gap, end));
                }
            }
            end = end.max(offsets[other] + o.bytes);
        }
        let offset = best.map_or(end, |(_, start)| start);
        offsets[b] = offset;
        total = total.max(offset + block.bytes);
        let at = placed.partition_point(|&p| offsets[p] < offset);
        placed.insert(at, b);
    }
    (offsets, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_alive_together_never_overlap() {
        for seed in 0..50u32 {
            let draw = |i: u64, n: u64| crate::rng::philox(seed, i) % n;
            let blocks: Vec<Block> = (0..60)
                .map(|i| {
                    let first = draw(3 * i, 40) as usize;
                    let last = first + draw(3 * i + 1, 10) as usize;
                    Block { bytes: 64 * draw(3 * i + 2, 20) as usize, first, last }
                })
                .collect();
            let (offsets, total) = place(&blocks);
            let mut peak = 0;
            for step in 0..50 {
                let alive = blocks.iter().filter(|b| b.first <= step && step <= b.last);
                peak = peak.max(alive.map(|b| b.bytes).sum::<usize>());
            }
            assert!(total >= peak && total <= 2 * peak, "seed {seed}: {total} for a peak of {peak}");
            for a in 0..blocks.len() {
                for b in 0..a {
                    let (x, y) = (&blocks[a], &blocks[b]);
                    let together = x.first <= y.last && y.first <= x.last && x.bytes > 0 && y.bytes > 0;
                    let apart = offsets[a] + x.bytes <= offsets[b] || offsets[b] + y.bytes <= offsets[a];
                    assert!(!together || apart, "seed {seed}: blocks {a} and {b} overlap");
                }
            }
        }
    }
}
