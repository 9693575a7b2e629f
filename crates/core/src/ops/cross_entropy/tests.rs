use super::{CrossEntropy, cross_entropy, cross_entropy_in_blocks, reference};
use crate::cpu::isa::Isa;
use crate::graph::{Graph, Recompute};
use crate::ops::elementwise;
use crate::ops::testing::{BF16_BOUNDS, CUDA, Case, Value, check_op, check_op_bf16, places};
use crate::{DType, TensorId};

/// Bound of losses against f64.
const BOUND: f64 = 1e-6;
/// Bound of the gradients against finite differences in f64.
const GRADIENT_BOUND: f64 = 1e-5;

fn ints(v: &Value) -> Vec<i32> {
    v.data.iter().map(|&i| i as i32).collect()
}

/// Targets below `vocabulary`, of which every third is −1 if `ignored`.
fn targets(tokens: usize, vocabulary: usize, ignored: bool) -> Value {
    let draw = |t: usize| (crate::rng::philox(9, t as u64) % vocabulary as u64) as i32;
    Value::ints(&(0..tokens).map(|t| if ignored && t % 3 == 1 { -1 } else { draw(t) }).collect::<Vec<_>>())
}

fn inputs(tokens: usize, vocabulary: usize, d: usize, targets: Value) -> [(&'static str, Value); 4] {
    [
        ("h", Value::random(tokens, d, 1)),
        ("weight", Value::random(vocabulary, d, 2)),
        ("targets", targets),
        ("scale", Value::new(1, 1, vec![0.125])),
    ]
}

fn operands(t: &[TensorId], with_gradient: bool) -> CrossEntropy {
    CrossEntropy { h: t[0], weight: t[1], targets: t[2], scale: t[3], with_gradient }
}

fn loss(v: &[Value]) -> Value {
    let loss = reference::cross_entropy(&v[0].data, &v[1].data, v[0].cols, &ints(&v[2]), v[3].data[0]);
    Value::new(1, 1, vec![loss])
}

fn nll(v: &[Value]) -> Value {
    let nll = reference::nll(&v[0].data, &v[1].data, v[0].cols, &ints(&v[2]));
    Value::new(1, nll.len(), nll)
}

#[test]
fn loss_and_gradients_agree_with_the_reference_and_finite_differences() {
    // A single token; several blocks with a rest; vocabularies narrower than a vector and wider than one f32 sum.
    for (tokens, vocabulary, d, block) in [(1, 1, 1, 256), (7, 5, 3, 3), (13, 40, 9, 4), (4, 1100, 2, 256)] {
        for ignored in [false, true] {
            if vocabulary == 1 {
                // The only token there is has probability 1: the gradient is 0.
                continue;
            }
            check_op(
                &inputs(tokens, vocabulary, d, targets(tokens, vocabulary, ignored)),
                &["h", "weight"],
                |g, t| vec![cross_entropy_in_blocks(g, operands(t, true), block).unwrap().loss],
                |v| vec![loss(v)],
                (BOUND, GRADIENT_BOUND),
            );
        }
    }
}

/// A GPU takes 256 tokens at a time in tests.
#[test]
fn many_tokens() {
    check_op(
        &inputs(600, 5, 3, targets(600, 5, true)),
        &["h", "weight"],
        |g, t| vec![cross_entropy(g, operands(t, true)).unwrap().loss],
        |v| vec![loss(v)],
        (BOUND, GRADIENT_BOUND),
    );
}

#[test]
fn losses_and_gradients_in_bf16() {
    for (tokens, vocabulary, d) in [(7, 5, 3), (13, 40, 9), (4, 1100, 2), (300, 9, 8)] {
        let inputs = inputs(tokens, vocabulary, d, targets(tokens, vocabulary, true));
        let build = |g: &mut Graph, t: &[TensorId]| {
            let out = cross_entropy(g, operands(t, true)).unwrap();
            vec![out.loss]
        };
        // Logits are rounded, and so are their gradients.
        check_op_bf16(&inputs, &["h", "weight"], &["h", "weight"], build, |v| vec![loss(v)], (1e-3, 1e-2));
        let nll_alone = |g: &mut Graph, t: &[TensorId]| vec![cross_entropy(g, operands(t, false)).unwrap().nll];
        check_op_bf16(&inputs, &["h", "weight"], &[], nll_alone, |v| vec![nll(v)], BF16_BOUNDS);
    }
}

#[test]
fn losses_of_tokens_with_and_without_gradient() {
    for with_gradient in [false, true] {
        for (tokens, vocabulary) in [(1, 1), (9, 33), (3, 5000)] {
            check_op(
                &inputs(tokens, vocabulary, 6, targets(tokens, vocabulary, true)),
                &[],
                |g, t| {
                    let out = cross_entropy_in_blocks(g, operands(t, with_gradient), 4).unwrap();
                    vec![out.loss, out.nll]
                },
                |v| vec![loss(v), nll(v)],
                (BOUND, 0.0),
            );
        }
    }
}

#[test]
fn only_the_losses_of_tokens() {
    let inputs = inputs(9, 33, 6, targets(9, 33, false));
    let build = |g: &mut Graph, t: &[TensorId]| vec![cross_entropy(g, operands(t, false)).unwrap().nll];
    check_op(&inputs, &[], build, |v| vec![nll(v)], (BOUND, 0.0));
}

#[test]
fn packed_weights_give_the_bits_of_rows() {
    let mut inputs = inputs(9, 77, 20, targets(9, 77, true));
    inputs[1].1.data.iter_mut().for_each(|v| *v = half::bf16::from_f64(*v).to_f64());
    let run = |isa: Isa, packed: Option<DType>| {
        let mut case = Case::new();
        let mut t: Vec<TensorId> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        if let Some(dtype) = packed {
            t[1] = case.packed("packed", &Value { dtype, ..inputs[1].1.clone() });
        }
        let out = cross_entropy(&mut case.graph, operands(&t, false)).unwrap();
        case.output("loss", out.loss);
        case.output("nll", out.nll);
        case.run_on(isa, 2)
    };
    for isa in Isa::available() {
        let rows = run(isa, None);
        assert_eq!(rows, run(isa, Some(DType::F32)));
        // AMX rounds the hidden vectors, too, where weights are bf16.
        if isa != Isa::Amx {
            assert_eq!(rows, run(isa, Some(DType::BF16)));
        }
    }
}

/// Loss, nll and gradients of the first `tokens` of a batch.
fn all_outputs(inputs: &[(&str, Value)], block: usize, d_loss: Option<f32>) -> (Case, usize) {
    let mut case = Case::new();
    let t: Vec<TensorId> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
    let out = cross_entropy_in_blocks(&mut case.graph, operands(&t, true), block).unwrap();
    let seed = match d_loss {
        Some(value) => elementwise::fill(&mut case.graph, DType::F32, 1, 1, value).unwrap(),
        None => case.input("seed", &Value::new(1, 1, vec![1.0])),
    };
    let grads = case.graph.backward(&[(out.loss, seed)], &t[..2], Recompute::Nothing).unwrap();
    let nodes = case.graph.nodes().len();
    case.output("dh", grads[0].unwrap());
    case.output("dw", grads[1].unwrap());
    case.output("loss", out.loss);
    case.output("nll", out.nll);
    (case, nodes)
}

#[test]
fn blocks_do_not_change_bits() {
    let inputs = inputs(29, 50, 11, targets(29, 50, true));
    let (whole, _) = all_outputs(&inputs, 256, Some(1.0));
    for block in [1, 2, 7, 20] {
        let (cut, _) = all_outputs(&inputs, block, Some(1.0));
        for place in places() {
            assert_eq!(whole.run_on(&place, 2), cut.run_on(&place, 1), "{place}: block {block}");
        }
    }
}

#[test]
fn a_token_does_not_depend_on_the_others() {
    let all = inputs(12, 50, 11, targets(12, 50, false));
    let whole = all_outputs(&all, 5, Some(1.0)).0.run();
    for t in 0..12 {
        let mut one = all.clone();
        one[0].1 = Value::new(1, 11, all[0].1.data[t * 11..(t + 1) * 11].to_vec());
        one[2].1 = Value::ints(&[all[2].1.data[t] as i32]);
        let alone = all_outputs(&one, 5, Some(1.0)).0.run();
        assert_eq!(alone["nll"].data[0], whole["nll"].data[t]);
        assert_eq!(alone["dh"].data, whole["dh"].data[t * 11..(t + 1) * 11]);
    }
}

#[test]
fn a_gradient_of_one_adds_no_op_and_any_other_scales() {
    let inputs = inputs(6, 10, 4, targets(6, 10, true));
    let (one, nodes) = all_outputs(&inputs, 4, Some(1.0));
    // The loss and the constant.
    assert_eq!(nodes, 2);
    let one = one.run();
    assert_eq!(one, all_outputs(&inputs, 4, None).0.run());
    let two = all_outputs(&inputs, 4, Some(2.0)).0.run();
    for name in ["dh", "dw"] {
        let doubled: Vec<f64> = one[name].data.iter().map(|v| 2.0 * v).collect();
        assert_eq!(two[name].data, doubled);
    }
}

#[test]
fn tokens_that_predict_nothing_have_no_loss_and_no_gradient() {
    let none = inputs(5, 7, 3, Value::ints(&[-1; 5]));
    all_outputs(&none, 2, Some(1.0)).0.run_everywhere(|_, out| {
        assert!(out.values().all(|v| v.data.iter().all(|&x| x == 0.0)));
    });
    let mut some = inputs(5, 7, 3, Value::ints(&[-1, 3, -1, -1, 0]));
    for place in places() {
        // What is not predicted may be anything; on a GPU, where it is multiplied by 0, anything finite.
        some[0].1.data[..3].fill(if place == CUDA { 1e30 } else { f64::NAN });
        let out = all_outputs(&some, 2, Some(1.0)).0.run_on(&place, 2);
        assert!(out["dh"].data[..3].iter().all(|&x| x == 0.0));
        assert!(out["dh"].data[6..12].iter().all(|&x| x == 0.0));
        assert!(out.values().all(|v| v.data.iter().all(|x| x.is_finite())));
    }
}

#[test]
fn targets_outside_of_the_vocabulary_are_nan() {
    for bad in [7, -2, i32::MIN, i32::MAX] {
        all_outputs(&inputs(3, 7, 3, Value::ints(&[0, bad, 6])), 2, Some(1.0)).0.run_everywhere(|_, out| {
            assert!(out["loss"].data[0].is_nan());
            let nll: Vec<bool> = out["nll"].data.iter().map(|v| v.is_nan()).collect();
            assert_eq!(nll, [false, true, false]);
            let dh: Vec<bool> = out["dh"].data.iter().map(|v| v.is_nan()).collect();
            assert_eq!(dh, [false, false, false, true, true, true, false, false, false]);
        });
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let mut inputs = inputs(2, 3, 1, Value::ints(&[0, 1]));
    inputs[0].1.data = vec![1e4, -1e4];
    inputs[1].1.data = vec![1.0, 0.5, -1.0];
    all_outputs(&inputs, 2, Some(1.0)).0.run_everywhere(|_, out| {
        assert_eq!(out["nll"].data, [0.0, 15_000.0]);
        assert!(out["dw"].data.iter().all(|v| v.is_finite()));
    });
}

#[test]
fn what_has_no_gradient_says_so() {
    let values = inputs(3, 7, 3, targets(3, 7, false));
    let mut case = Case::new();
    let t: Vec<TensorId> = values.iter().map(|(name, v)| case.input(name, v)).collect();
    let seed = case.input("seed", &Value::new(1, 1, vec![1.0]));
    let out = cross_entropy(&mut case.graph, operands(&t, false)).unwrap();
    let message = case.graph.backward(&[(out.loss, seed)], &t[..1], Recompute::Nothing).unwrap_err().to_string();
    assert_eq!(message, "cross_entropy: it was recorded without gradient; set with_gradient");
    let packed = case.packed("packed", &values[1].1);
    let message = cross_entropy(&mut case.graph, operands(&[t[0], packed, t[2], t[3]], true)).unwrap_err().to_string();
    assert_eq!(message, "cross_entropy: the weight must be f32 by rows to have a gradient, but is f32 Panels");
}
