use super::{embedding, reference};
use crate::cpu::isa::Isa;
use crate::dtype::DType;
use crate::graph::{Graph, TensorId};
use crate::ops::testing::{Case, Value, check_op, check_op_bf16};

/// Rows are copied; bf16 widens exactly.
const BOUND: f64 = 0.0;
/// Bound of the gradient against finite differences in f64.
const GRADIENT_BOUND: f64 = 1e-6;

fn expected(v: &[Value]) -> Vec<Value> {
    let ids: Vec<i32> = v[0].data.iter().map(|&i| i as i32).collect();
    vec![Value::new(ids.len(), v[1].cols, reference::embedding(&ids, &v[1].data, v[1].cols))]
}

#[test]
fn tokens_that_repeat_add_up_in_the_gradient() {
    for (ids, vocabulary, d) in [(vec![0], 1, 1), (vec![2, 2, 0, 4, 2], 5, 3), (vec![150, 7, 7, 64], 151, 20)] {
        let inputs = [("ids", Value::ints(&ids)), ("weight", Value::random(vocabulary, d, 1))];
        let build = |g: &mut Graph, t: &[TensorId]| vec![embedding(g, t[0], t[1]).unwrap()];
        check_op(&inputs, &["weight"], build, expected, (BOUND, GRADIENT_BOUND));
        check_op_bf16(&inputs, &["weight"], &["weight"], build, expected, (BOUND, GRADIENT_BOUND));
    }
}

#[test]
fn narrow_tables_are_widened_exactly() {
    let weight = Value::random(9, 21, 1);
    for weight in [weight.to_bf16(), weight.to_q8_0()] {
        let inputs = [("ids", Value::ints(&[8, 0, 3])), ("weight", weight)];
        check_op(&inputs, &[], |g, t| vec![embedding(g, t[0], t[1]).unwrap()], expected, (BOUND, 0.0));
    }
}

#[test]
fn packed_tables_give_the_same_rows() {
    let mut weight = Value::random(71, 21, 1);
    weight.data.iter_mut().for_each(|v| *v = half::bf16::from_f64(*v).to_f64());
    for dtype in [DType::F32, DType::BF16] {
        weight.dtype = dtype;
        let ids = Value::ints(&[70, 0, 31, 32, 9, -1]);
        let mut case = Case::new();
        let (t, table) = (case.input("ids", &ids), case.packed("weight", &weight));
        let y = embedding(&mut case.graph, t, table).unwrap();
        case.output("y", y);
        let expected = &expected(&[ids, weight.clone()])[0];
        for isa in Isa::available() {
            let y = &case.run_on(isa, 2)["y"];
            assert_eq!(y.data[..5 * 21], expected.data[..5 * 21], "{isa}");
            assert!(y.data[5 * 21..].iter().all(|v| v.is_nan()));
        }
    }
}

#[test]
fn ids_outside_of_the_vocabulary_are_rows_of_nan() {
    let mut case = Case::new();
    let ids = case.input("ids", &Value::ints(&[1, 3, -1]));
    let weight = case.input("weight", &Value::random(3, 2, 1));
    let y = embedding(&mut case.graph, ids, weight).unwrap();
    case.output("y", y);
    case.run_everywhere(|_, out| {
        let y = &out["y"].data;
        assert!(y[..2].iter().all(|v| !v.is_nan()) && y[2..].iter().all(|v| v.is_nan()));
    });
}
