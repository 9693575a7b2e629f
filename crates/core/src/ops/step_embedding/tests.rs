use super::step_embedding;
use crate::ops::testing::{Case, Value};

#[test]
fn rows_ready_for_a_product() {
    for (tokens, rows, cols) in [(1, 5, 7), (3, 20, 768), (16, 9, 2560)] {
        let table = Value::random(rows, cols, 1);
        let (table, weight) = (if cols == 768 { table.to_q8_0() } else { table.to_bf16() }, Value::random(1, cols, 2));
        let ids: Vec<i32> = (0..tokens as i32).map(|t| (7 * t + 3) % rows as i32).collect();
        let mut case = Case::new();
        let operands =
            [case.input("ids", &Value::ints(&ids)), case.input("table", &table), case.input("weight", &weight)];
        let out = step_embedding(&mut case.graph, operands[0], operands[1], operands[2]).unwrap();
        for (name, t) in [("stream", out.stream), ("weighted", out.weighted), ("squares", out.squares)] {
            case.output(name, t);
        }
        let of = |f: &dyn Fn(usize, usize) -> f64| {
            Value::new(tokens, cols, (0..tokens * cols).map(|i| f(ids[i / cols] as usize, i % cols)).collect())
        };
        let squares: Vec<f64> =
            (0..tokens).map(|t| (0..cols).map(|c| table.at(ids[t] as usize, c).powi(2)).sum()).collect();
        let squares = Value::new(tokens, 1, squares);
        case.run_on_gpu(|out| {
            assert_eq!(out["stream"].data, of(&|r, c| table.at(r, c)).data);
            assert!(of(&|r, c| table.at(r, c) * weight.at(0, c)).error(&out["weighted"]) <= 4e-3);
            assert!(squares.error(&out["squares"]) <= 1e-5);
        });
    }
}
