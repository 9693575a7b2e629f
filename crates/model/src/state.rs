//! The state of a sequence: what a model remembers of all tokens so far, of constant size.
//!
//! Per layer the parts that its kind has, such as the convolution's window and the SSM's state, in f32. A [`State`] is a value: it can be copied, compared,
//! saved and loaded. A [`StatePool`] holds the states of many sequences on the device.

use std::path::Path;

use hognose_core::{Buffer, Device, Slice};
use safetensors::tensor::{Dtype, TensorView};

use crate::config::{LayerConfig, ModelConfig};
use crate::error::Error;
use crate::network::state_name;

/// Version of the state file's layout.
const VERSION: &str = "1";
const FORMAT: &str = "hognose-state";

/// The parts of one layer's state and how many f32 each holds, in their order in memory.
///
/// `conv` holds (d_conv − 1) · channels, a convolution's last inputs, oldest first; `ssm` d_state · d_inner, state-major,
/// or heads · headdim · d_state for Mamba-2; `position` and `kv` the ring of attention's keys and values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerState(Vec<(&'static str, usize)>);

impl LayerState {
    /// The parts of a layer's state.
    pub fn of(layer: &LayerConfig) -> LayerState {
        LayerState(layer.mixer.state())
    }

    /// Names and widths.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, usize)> {
        self.0.iter().copied()
    }

    /// The width of a part, 0 where the layer has none of that name.
    pub fn width(&self, part: &str) -> usize {
        self.parts().find(|(name, _)| *name == part).map_or(0, |(_, width)| width)
    }

    /// Numbers of all parts.
    pub fn values(&self) -> usize {
        self.parts().map(|(_, width)| width).sum()
    }
}

/// The state of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Fingerprint of the parameters it belongs to.
    pub model: String,
    /// Tokens that it remembers.
    pub position: u64,
    /// Ids that were chosen but not processed yet: they come first when the sequence goes on.
    pub pending: Vec<u32>,
    layers: Vec<LayerState>,
    /// All parts of all layers, one after another.
    values: Vec<f32>,
}

impl State {
    /// The state before the first token.
    pub fn zero(config: &ModelConfig, model: String) -> State {
        let layers: Vec<LayerState> = config.layers.iter().map(LayerState::of).collect();
        let values = vec![0.0; layers.iter().map(LayerState::values).sum()];
        State { model, position: 0, pending: Vec::new(), layers, values }
    }

    /// The numbers: the parts of each layer, one after another.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Bytes of the numbers.
    pub fn bytes(&self) -> usize {
        self.values.len() * 4
    }

    /// Writes a safetensors file with a tensor `layers.I.PART` for every part (`conv`, `ssm` …) and, as metadata, version, model,
    /// position and pending ids. The file appears whole or not at all.
    ///
    /// # Errors
    /// The disk; a file that was there stays then.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut views = Vec::new();
        let mut start = 0;
        let bytes: Vec<u8> = self.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for (i, layer) in self.layers.iter().enumerate() {
            for (part, len) in layer.parts() {
                let view = TensorView::new(Dtype::F32, vec![len], &bytes[4 * start..4 * (start + len)])
                    .map_err(|e| Error::file(path, e))?;
                views.push((format!("layers.{i}.{part}"), view));
                start += len;
            }
        }
        let pending: Vec<String> = self.pending.iter().map(u32::to_string).collect();
        let metadata = [
            ("format", FORMAT.to_string()),
            ("version", VERSION.to_string()),
            ("model", self.model.clone()),
            ("position", self.position.to_string()),
            ("pending", pending.join(",")),
        ];
        let metadata = metadata.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let data = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::file(path, e))?;
        Ok(crate::atomic::write(path, &data)?)
    }

    /// Reads a file that [`State::save`] wrote. `model` is the fingerprint of the parameters it is to continue with:
    /// a state of other parameters is refused.
    ///
    /// # Errors
    /// No state file, another version, a state of another model, damaged numbers.
    pub fn load(path: &Path, config: &ModelConfig, model: &str) -> Result<State, Error> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let bad = |message: String| Error::file(path, message);
        let not_a_state = || bad("is not a state file of hognose; `generate --save-state` writes one".into());
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|_| not_a_state())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| metadata.get(name).cloned().unwrap_or_default();
        if field("format") != FORMAT {
            return Err(not_a_state());
        }
        if field("version") != VERSION {
            return Err(bad(format!(
                "has version {} of the state format; this hognose reads {VERSION}",
                field("version")
            )));
        }
        if field("model") != model {
            return Err(bad(format!(
                "belongs to the model {}, not to this one ({model}); load it with the model that it was saved from",
                field("model")
            )));
        }
        let mut state = State::zero(config, model.to_string());
        state.position = field("position").parse().map_err(|_| bad("has no valid position".into()))?;
        let pending = field("pending");
        for id in pending.split(',').filter(|s| !s.is_empty()) {
            let id: u32 = id.parse().map_err(|_| bad(format!("has an invalid pending id {id:?}")))?;
            if id as usize >= config.padded_vocab {
                return Err(bad(format!("has the pending id {id} outside the vocabulary of {}", config.padded_vocab)));
            }
            state.pending.push(id);
        }
        let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("is damaged: {e}")))?;
        let mut start = 0;
        for (i, layer) in state.layers.iter().enumerate() {
            for (part, len) in layer.parts() {
                let name = format!("layers.{i}.{part}");
                let view = file.tensor(&name).map_err(|_| bad(format!("lacks the tensor {name}")))?;
                if view.dtype() != Dtype::F32 || view.shape() != [len] {
                    let (dtype, shape) = (view.dtype(), view.shape());
                    return Err(bad(format!("{name} is {dtype:?} {shape:?}; expected F32 [{len}]")));
                }
                for (to, from) in state.values[start..start + len].iter_mut().zip(view.data().chunks_exact(4)) {
                    *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                    if !to.is_finite() {
                        return Err(bad(format!("{name} holds a number that is not finite")));
                    }
                }
                start += len;
            }
        }
        Ok(state)
    }
}

/// What a state file says about itself, for `inspect`: its metadata, if it is a state file.
pub fn describe(path: &Path) -> Option<Vec<(String, String)>> {
    let file = std::fs::File::open(path).ok()?;
    // SAFETY: the map is read once, here; a file changed by somebody else meanwhile can only garble the text shown.
    let map = unsafe { memmap2::Mmap::map(&file) }.ok()?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&map).ok()?;
    let metadata = header.metadata().clone()?;
    if metadata.get("format").map(String::as_str) != Some(FORMAT) {
        return None;
    }
    let mut lines: Vec<(String, String)> = metadata.into_iter().collect();
    lines.sort();
    lines.push(("tensors".into(), header.tensors().len().to_string()));
    lines.push(("bytes".into(), map.len().to_string()));
    Some(lines)
}

/// What the matrices of a pool are aligned to, in numbers: 64 bytes, as kernels may assume of externals.
const ALIGNMENT: usize = 16;

/// The states of `slots` sequences on a device: per layer and part a matrix `[slots, width]`.
#[derive(Debug)]
pub struct StatePool {
    layers: Vec<LayerState>,
    slots: usize,
    buffer: Buffer,
}

impl StatePool {
    /// A pool of zero states.
    pub fn new(device: &Device, config: &ModelConfig, slots: usize) -> Result<StatePool, Error> {
        let layers: Vec<LayerState> = config.layers.iter().map(LayerState::of).collect();
        let numbers: usize = layers.iter().flat_map(LayerState::parts).map(|(_, width)| matrix(width, slots)).sum();
        Ok(StatePool { layers, slots, buffer: device.alloc(numbers * 4)? })
    }

    /// Number of sequences.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of all states.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Sets every state to zero.
    pub fn clear(&self) {
        self.buffer.clear();
    }

    /// Sets the state of one slot to zero.
    pub fn clear_slot(&self, slot: usize) {
        self.each_part(|base, width, _| self.buffer.write(4 * (base + slot * width), &vec![0f32; width]));
    }

    /// Takes over a sequence's state.
    pub fn write(&self, slot: usize, state: &State) {
        assert_eq!(state.layers, self.layers, "a state of another model");
        self.each_part(|base, width, start| {
            self.buffer.write(4 * (base + slot * width), &state.values[start..start + width]);
        });
    }

    /// Copies the numbers of a slot into `state`.
    pub fn read(&self, slot: usize, state: &mut State) {
        assert_eq!(state.layers, self.layers, "a state of another model");
        let values = &mut state.values;
        self.each_part(|base, width, start| {
            self.buffer.read(4 * (base + slot * width), &mut values[start..start + width]);
        });
    }

    /// Copies slot `from` over slot `to_slot` of another pool of the same model.
    pub fn copy(&self, from: usize, to: &StatePool, to_slot: usize) {
        let (mut base, mut to_base) = (0, 0);
        for (_, width) in self.layers.iter().flat_map(LayerState::parts) {
            let from = self.buffer.at(4 * (base + from * width));
            to.buffer.copy_from(4 * (to_base + to_slot * width), from, 4 * width);
            base += matrix(width, self.slots);
            to_base += matrix(width, to.slots);
        }
    }

    /// Calls `f(first number of the part's matrix, width, first number inside a [`State`])` for every part.
    fn each_part(&self, mut f: impl FnMut(usize, usize, usize)) {
        let (mut base, mut start) = (0, 0);
        for (_, width) in self.layers.iter().flat_map(LayerState::parts) {
            f(base, width, start);
            base += matrix(width, self.slots);
            start += width;
        }
    }

    /// The memory of all states.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The memory of all states, to read without a copy.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    /// The memory of the state external `name`, if it is one of `end` (see [`state_name`]).
    pub fn slice(&self, name: &str, end: bool) -> Option<Slice<'_>> {
        let mut base = 0;
        for (i, layer) in self.layers.iter().enumerate() {
            for (part, width) in layer.parts() {
                if state_name(i, part, end) == name {
                    return Some(self.buffer.at(4 * base));
                }
                base += matrix(width, self.slots);
            }
        }
        None
    }
}

/// Numbers that the matrix of a part takes, so that the next one is aligned.
fn matrix(width: usize, slots: usize) -> usize {
    (width * slots).next_multiple_of(ALIGNMENT)
}
