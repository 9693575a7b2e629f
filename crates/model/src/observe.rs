//! What goes on inside of a model's layers while it reads a text: the same graph as everywhere, with some of its
//! intermediate tensors as outputs.

use std::collections::BTreeMap;

use hognose_core::{DType, Pack};

use crate::error::Error;
use crate::network::{IDS, Recorder, SEGMENTS, States, observed_name};
use crate::session::Model;

/// A tensor from inside of a layer, row-major, a row a token.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Number of columns.
    pub cols: usize,
    /// `[tokens, cols]`
    pub values: Vec<f32>,
}

/// Runs a model over a sequence from its beginning and returns, for every layer, the tensors that
/// [`Recorder::observing`] lists, by name. Activations must be f32: any model on a CPU.
///
/// # Errors
/// An id outside the vocabulary; activations in bf16; too little memory.
pub fn observe(model: &Model, ids: &[u32]) -> Result<Vec<BTreeMap<&'static str, Observed>>, Error> {
    let vocabulary = model.config.padded_vocab;
    if let Some((at, &id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= vocabulary) {
        return Err(Error::TokenId { id, at, vocabulary });
    }
    let (device, form) = (&model.device, model.weights.form());
    if form.activations() != DType::F32 {
        let message = "activations are f32 here; load the model in f32".to_string();
        return Err(hognose_core::Error::Unsupported { op: "observe", message }.into());
    }
    let mut recorder = Recorder::new(&model.config, form, ids.len(), 1, States::None).observing();
    recorder.hidden()?;
    let plan = device.plan(recorder.graph)?;
    let arena = device.arena(&plan)?;
    let mut memory = Vec::new();
    for external in plan.graph().externals() {
        let own = model.weights.slice(&external.name).is_none();
        memory.push(own.then(|| device.alloc(device.external_bytes(&plan, external.tensor))).transpose()?);
    }
    let pack = Pack::from_lengths([ids.len()])?;
    let mut bindings = Vec::new();
    for (external, own) in plan.graph().externals().iter().zip(&memory) {
        if let Some(own) = own {
            match external.name.as_str() {
                IDS => own.write(0, &ids.iter().map(|&id| id as i32).collect::<Vec<i32>>()),
                SEGMENTS => own.write(0, pack.offsets()),
                _ => {}
            }
            bindings.push(own.at(0));
        } else if let Some(slice) = model.weights.slice(&external.name) {
            bindings.push(slice);
        }
    }
    device.run(&plan, &arena, &bindings)?;
    let mut layers = vec![BTreeMap::new(); model.config.layers.len()];
    for (layer, tensors) in layers.iter_mut().enumerate() {
        for what in ["x", "dt", "B", "C", "z", "y"] {
            let name = observed_name(layer, what);
            let found = plan.graph().externals().iter().zip(&memory).find(|(external, _)| external.name == name);
            if let Some((external, Some(own))) = found {
                let cols = plan.graph().cols(external.tensor);
                tensors.insert(what, Observed { cols, values: own.to_vec(0, ids.len() * cols) });
            }
        }
    }
    Ok(layers)
}
