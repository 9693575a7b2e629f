//! Layers that read a sequence in both directions: what they compute, and what they cannot be asked for.

use std::collections::HashMap;
use std::fs;

use hognose::{DType, Device, GenerateOptions, Model, ModelConfig, Session};
use hognose_core::Pack;
use hognose_model::weights::{Form, Weights};
use hognose_model::{pattern, presets};
use hognose_train::step::gradients;

use crate::common::*;

const D_MODEL: usize = 16;

fn model(layers: &str) -> Model {
    let layers = pattern::layers(layers, D_MODEL).unwrap();
    let config = ModelConfig { layers, d_model: D_MODEL, ..presets::preset("tiny").unwrap() };
    config.validate().unwrap();
    let device = Device::cpu(Some(2)).unwrap();
    let weights = Weights::initialise(&device, &config, Form::Training(DType::F32), 5).unwrap();
    Model { config, weights, device }
}

/// Takes over the parameters of another model; `name_of` gives the name there, `None` makes zeros.
fn copy(to: &Model, from: &Model, name_of: impl Fn(&str) -> Option<String>) {
    let places: HashMap<_, _> = from.weights.entries().map(|(offset, spec)| (spec.name.clone(), offset)).collect();
    for (offset, spec) in to.weights.entries() {
        let values = match name_of(&spec.name) {
            Some(name) => from.weights.buffer().to_vec::<f32>(places[&name], spec.numel()),
            None => vec![0.0; spec.numel()],
        };
        to.weights.buffer().write(offset, &values);
    }
}

fn ids(n: usize) -> Vec<u32> {
    Draws::new(3).ids(n, 256)
}

fn logits(model: &Model, ids: &[u32]) -> Vec<Vec<f32>> {
    let all = hognose::forward(model, ids).unwrap();
    all.chunks(model.config.padded_vocab).map(<[f32]>::to_vec).collect()
}

fn flipped<T: Clone>(values: &[T]) -> Vec<T> {
    values.iter().rev().cloned().collect()
}

#[test]
fn tied_directions_turn_around_with_their_input() {
    let tied = model("vim(d_state=4, tied=true), vim(d_state=3, d_conv=2, tied=true)+mlp");
    let ids = ids(70);
    assert!(logits(&tied, &flipped(&ids)) == flipped(&logits(&tied, &ids)));
    let untied = model("vim(d_state=4)");
    assert!(logits(&untied, &flipped(&ids)) != flipped(&logits(&untied, &ids)));
}

#[test]
fn each_direction_is_a_mamba() {
    let (vim, mamba, tied) = (model("vim(d_state=4)"), model("mamba1(d_state=4)"), model("vim(d_state=4, tied=true)"));
    let ids = ids(40);
    let plain = |name: &str| Some(name.replace(".reverse.", "."));
    copy(&vim, &tied, plain);
    assert!(logits(&vim, &ids) == logits(&tied, &ids));
    // A direction gives nothing where nothing comes through its convolution.
    for silent in [true, false] {
        copy(&vim, &mamba, |name| {
            let off = name.contains("conv1d") && name.contains(".reverse.") == silent;
            if off { None } else { plain(name) }
        });
        let found = logits(&vim, &ids);
        let one = if silent { logits(&mamba, &ids) } else { flipped(&logits(&mamba, &flipped(&ids))) };
        assert!(found == one, "the reversed direction is silent: {silent}");
    }
}

#[test]
fn sequences_in_a_pack_do_not_see_each_other() {
    let model = model("vim(d_state=4), vim(d_state=4, tied=true)");
    let ids = ids(58);
    let lengths = [40, 0, 1, 17];
    let mut session = Session::new(&model, lengths.len()).unwrap();
    let rows: Vec<usize> = (0..ids.len()).collect();
    let found = session.run(&ids, &Pack::from_lengths(lengths).unwrap(), &rows).unwrap();
    let (mut first, mut separate) = (0, Vec::new());
    for n in lengths {
        separate.extend(logits(&model, &ids[first..first + n]).concat());
        first += n;
    }
    assert!(found == separate);
}

#[test]
fn gradients_agree_with_differences() {
    for layers in ["vim(d_state=4)", "vim(d_state=4, tied=true)"] {
        let model = model(layers);
        let (ids, pack) = (ids(30), Pack::from_lengths([19, 0, 11]).unwrap());
        let run = || gradients(&model.device, &model.config, &model.weights, &ids, &pack).unwrap();
        let tensors = run().tensors;
        for ((offset, spec), (name, _, gradient)) in model.weights.entries().zip(&tensors) {
            assert_eq!(&spec.name, name);
            // Along its gradient the loss changes by the gradient's square.
            let square: f64 = gradient.iter().map(|g| f64::from(g * g)).sum();
            assert!(square > 0.0, "{name} has no gradient");
            let values = model.weights.buffer().to_vec::<f32>(offset, spec.numel());
            let step = 0.01 / square.sqrt();
            let loss = |sign: f64| {
                let moved = values.iter().zip(gradient).map(|(v, g)| v + (sign * step) as f32 * g);
                model.weights.buffer().write(offset, &moved.collect::<Vec<f32>>());
                f64::from(run().loss)
            };
            let difference = (loss(1.0) - loss(-1.0)) / (2.0 * step);
            model.weights.buffer().write(offset, &values);
            // Beside the rounding of two losses of about 6.
            let bound = 0.02 * square + 1e-6 / step;
            assert!((difference - square).abs() < bound, "{name}: {difference} and {square}");
        }
    }
}

#[test]
fn what_needs_causality_is_refused() {
    let model = model("mamba1, vim");
    let ids = ids(9);
    let words = "layer 1 (vim) reads a sequence in both directions, so ";
    let mut session = Session::new(&model, 1).unwrap();
    let pack = Pack::from_lengths([ids.len()]).unwrap();
    session.run(&ids, &pack, &[]).unwrap();
    let error = session.run(&ids, &pack, &[]).unwrap_err().to_string();
    assert!(error.contains(words) && error.contains("cannot go on"), "{error}");
    session.reset(0);
    session.run(&ids, &pack, &[]).unwrap();
    let watch = |_| std::ops::ControlFlow::Continue(());
    let error = hognose_engine::generate(&mut session, None, &ids, &GenerateOptions::default(), watch).unwrap_err();
    assert!(error.to_string().contains(words) && error.to_string().contains("generate"), "{error}");
    let scratch = folder();
    let [file, texts] = ["config.toml", "texts"].map(|n| scratch.path().join(n));
    write_texts(&texts, 3, 60);
    fs::write(&file, "[model]\nd_model = 16\nlayers = \"mamba1, vim\"\n").unwrap();
    let train = ["train", "--config", arg(&file), "--data", arg(&texts), "--plan-only"];
    fails(1, &train, &[words, "it would see the tokens that it is to predict"]);
}
