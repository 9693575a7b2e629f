//! Names and shapes of tensors in a GGUF file.

use crate::config::{Mixer, ModelConfig, ParamKind, ParamSpec};

/// Tensors outside of the layers: canonical name and that in the file.
const OUTSIDE: [(&str, &str); 3] = [
    ("backbone.embedding.weight", "token_embd.weight"),
    ("backbone.norm_f.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// Tensors of a layer, behind `backbone.layers.N.` and `blk.N.`; a model has one of `dt_proj.bias` and `dt_bias`.
const LAYER: [(&str, &str); 12] = [
    ("norm.weight", "attn_norm.weight"),
    ("mixer.in_proj.weight", "ssm_in.weight"),
    ("mixer.conv1d.weight", "ssm_conv1d.weight"),
    ("mixer.conv1d.bias", "ssm_conv1d.bias"),
    ("mixer.x_proj.weight", "ssm_x.weight"),
    ("mixer.dt_proj.weight", "ssm_dt.weight"),
    ("mixer.dt_proj.bias", "ssm_dt.bias"),
    ("mixer.dt_bias", "ssm_dt.bias"),
    ("mixer.A_log", "ssm_a"),
    ("mixer.D", "ssm_d"),
    ("mixer.norm.weight", "ssm_norm.weight"),
    ("mixer.out_proj.weight", "ssm_out.weight"),
];

/// What a file calls a tensor.
pub(in super::super) fn native_name(canonical: &str) -> String {
    if let Some((_, native)) = OUTSIDE.iter().find(|n| n.0 == canonical) {
        return native.to_string();
    }
    let parts = canonical.strip_prefix("backbone.layers.").and_then(|rest| rest.split_once('.'));
    let found = parts.and_then(|(layer, rest)| Some((layer, LAYER.iter().find(|n| n.0 == rest)?.1)));
    found.map_or_else(|| canonical.to_string(), |(layer, native)| format!("blk.{layer}.{native}"))
}

/// The axes of a tensor in a file, innermost first. The convolution has lost its axis of length 1; Mamba-2's A and D are
/// one column, and its norm a row for each group.
pub(super) fn dims(spec: &ParamSpec, config: &ModelConfig) -> Vec<usize> {
    let mamba2 = config.layers.iter().find_map(|l| match &l.mixer {
        Mixer::Mamba2(m) => Some(m),
        _ => None,
    });
    match (spec.shape.as_slice(), mamba2) {
        (&[channels, 1, width], _) if spec.kind == ParamKind::Convolution => vec![width, channels],
        (&[heads], Some(_)) if spec.name.ends_with(".A_log") || spec.name.ends_with(".D") => vec![1, heads],
        (&[width], Some(m)) if spec.name.ends_with(".mixer.norm.weight") => vec![width / m.ngroups, m.ngroups],
        (shape, _) => shape.iter().rev().copied().collect(),
    }
}

/// Whether two lists of axes are the same shape: axes of length 1 at the end may be left out.
pub(super) fn same_dims(a: &[usize], b: &[usize]) -> bool {
    fn trimmed(dims: &[usize]) -> &[usize] {
        let end = dims.iter().rposition(|&n| n != 1).map_or(0, |i| i + 1);
        &dims[..end]
    }
    trimmed(a) == trimmed(b)
}
