//! `hognose forward`: the contract with the outside. Reads token ids, writes logits, loss and gradients.

use std::path::Path;

use anyhow::{Context, bail};
use hognose::{Device, Session};
use hognose_core::Pack;
use hognose_model::checkpoint::Checkpoint;
use hognose_model::session::next_token_loss;
use hognose_model::weights::{Form, Weights};
use hognose_train::step::{Gradients, gradients};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::args::{DTypeArg, ForwardArgs, Usage};
use crate::terminal;

pub fn run(args: ForwardArgs) -> anyhow::Result<()> {
    let ids = read_ids(&args.ids)?;
    let mut compute = args.compute.clone();
    compute.dtype = compute.dtype.or(Some(DTypeArg::F32));
    let loaded = super::load(&args.model, None, &compute)?;
    if let (true, Some(DTypeArg::Bf16), Device::Cpu(_)) = (args.grads, args.compute.dtype, &loaded.model.device) {
        let message = "on a CPU --grads computes in f32; leave out --dtype bf16";
        return Err(Usage(message.into()).into());
    }
    if let (true, Some(dtype)) = (args.grads, args.compute.dtype) {
        dtype.check_trains()?;
    }
    eprintln!("{}: {}", args.model, super::describe(&loaded));
    let vocabulary = loaded.model.config.padded_vocab;
    if let Err(error) = loaded.model.config.expect_causal("the loss is of tokens that it sees") {
        eprintln!("warning: {error}");
    }

    let total = (ids.batch * ids.length) as u64;
    let bar = terminal::bar(total, "forward {wide_bar} {pos}/{len} tokens, {eta} left");
    let mut logits: Vec<f32> = Vec::new();
    let elements = (ids.batch * ids.length).checked_mul(vocabulary).context("the logits are too many to hold")?;
    logits.try_reserve_exact(elements).with_context(|| format!("no memory for {elements} logits"))?;
    let mut nats = 0.0;
    let mut session = Session::new(&loaded.model, 1)?;
    for row in ids.values.chunks_exact(ids.length) {
        session.reset(0);
        let start = logits.len();
        logits.extend(hognose::forward_in(&mut session, row)?);
        nats += next_token_loss(&logits[start..], row, vocabulary);
        bar.inc(ids.length as u64);
    }
    bar.finish_and_clear();
    let predicted = ids.batch * (ids.length - 1);
    if predicted == 0 {
        eprintln!("warning: one token predicts nothing, so the loss is NaN");
    }
    let loss = (nats / predicted as f64) as f32;
    if logits.iter().any(|v| !v.is_finite()) {
        eprintln!("warning: the logits are not all finite; the checkpoint may be damaged");
    }

    let mut out = vec![
        ("logits".to_string(), vec![ids.batch, ids.length, vocabulary], logits),
        ("loss".to_string(), vec![1], vec![loss]),
    ];
    if args.grads {
        if predicted == 0 {
            bail!("one token predicts nothing, so there is no loss to take gradients of; give a length of at least 2");
        }
        let device = loaded.model.device.clone();
        let folder = loaded.path.clone();
        let loaded_form = loaded.model.weights.form().clone();
        drop(session);
        drop(loaded);
        let checkpoint = Checkpoint::open(&folder)?;
        // On a CPU gradients are f32 whatever the matrices of the forward pass were.
        let dtype = loaded_form.activations();
        let weights = Weights::load(&device, &checkpoint, Form::Training(dtype))?;
        let pack = Pack::from_lengths(std::iter::repeat_n(ids.length, ids.batch))?;
        let Gradients { tensors, .. } = gradients(&device, &checkpoint.config, &weights, &ids.values, &pack)?;
        for (name, shape, values) in tensors {
            let native = checkpoint.native_name(&name).unwrap_or(&name).to_string();
            out.push((format!("grad.{native}"), shape, values));
        }
    }
    write(&args.out, out)?;
    eprintln!("loss {loss:.6} over {predicted} predictions, written to {}", args.out.display());
    Ok(())
}

struct Ids {
    batch: usize,
    length: usize,
    values: Vec<u32>,
}

fn read_ids(path: &Path) -> anyhow::Result<Ids> {
    let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("{} is not a valid safetensors file", path.display()))?;
    let Ok(view) = file.tensor("input_ids") else {
        bail!("{} has no tensor input_ids; it has {}", path.display(), file.names().join(", "));
    };
    let &[batch, length] = view.shape() else {
        bail!("{}: input_ids has the shape {:?}; expected (batch, length)", path.display(), view.shape());
    };
    if batch == 0 || length == 0 {
        bail!("{}: input_ids is empty: batch {batch}, length {length}", path.display());
    }
    let wide: Vec<i64> = match view.dtype() {
        Dtype::I64 => {
            let words = view.data().as_chunks::<8>().0;
            words.iter().map(|b| i64::from_le_bytes(*b)).collect()
        }
        Dtype::I32 => {
            let words = view.data().as_chunks::<4>().0;
            words.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect()
        }
        other => bail!("{}: input_ids holds {other:?}; expected I64 (or I32)", path.display()),
    };
    let values = wide.iter().enumerate().map(|(at, &id)| {
        u32::try_from(id).map_err(|_| anyhow::anyhow!("{}: id {id} at position {at} is not valid", path.display()))
    });
    Ok(Ids { batch, length, values: values.collect::<Result<_, _>>()? })
}

fn write(path: &Path, tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> anyhow::Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, values) in &tensors {
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values))?));
    }
    let data = safetensors::serialize(views, None)?;
    hognose_model::atomic::write(path, &data)?;
    Ok(())
}
