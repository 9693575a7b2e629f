use super::*;
use crate::ops::layout::split;
use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};

/// The same in plain f64, for `x` of rows of `width` numbers.
fn reference(x: &[f64], width: usize, order: &[i32], offsets: &[i32]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for ends in offsets.windows(2) {
        let (first, end) = (ends[0] as usize, ends[1] as usize);
        y[first * width..end * width].copy_from_slice(&x[first * width..end * width]);
        for grid in 0..(end - first) / order.len() {
            for (i, &cell) in order.iter().enumerate() {
                let [to, from] = [i, cell as usize].map(|i| (first + grid * order.len() + i) * width);
                y[to..to + width].copy_from_slice(&x[from..from + width]);
            }
        }
    }
    y
}

fn inverse(order: &[i32]) -> Vec<i32> {
    let mut inverse = vec![0; order.len()];
    order.iter().zip(0..).for_each(|(&cell, i)| inverse[cell as usize] = i);
    inverse
}

#[test]
fn whole_grids_of_each_segment_are_permuted() {
    let spread: Vec<i32> = (0..97).map(|i| i * 35 % 97).collect();
    // Empty segments, short ones, several grids, a rest behind them, rows before the first and behind the last.
    for (rows, width, order, offsets) in [
        (14, 3, vec![2, 0, 3, 1], vec![1, 1, 5, 6, 12, 12]),
        (400, 40, spread, vec![0, 97, 399]),
        (3, 16, vec![0], vec![0, 3]),
    ] {
        let inputs = [
            ("x", Value::random(rows, width + 8, 1)),
            ("order", Value::ints(&order)),
            ("inverse", Value::ints(&inverse(&order))),
            ("segments", Value::ints(&offsets)),
        ];
        let build = |g: &mut Graph, t: &[TensorId]| {
            let x = split(g, t[0], &[8, width]).unwrap()[1];
            vec![permute_rows(g, x, [t[1], t[2]], t[3]).unwrap()]
        };
        let expected = |v: &[Value]| {
            let x: Vec<f64> = v[0].data.chunks(width + 8).flat_map(|row| row[8..].to_vec()).collect();
            vec![Value::new(rows, width, reference(&x, width, &order, &offsets))]
        };
        // Differences of many values take long; a copy's gradient shows in few.
        let wanted: &[&str] = if rows < 100 { &["x"] } else { &[] };
        check_op(&inputs, wanted, build, expected, (0.0, 1e-6));
        check_op_bf16(&inputs, &["x"], wanted, build, expected, BF16_BOUNDS);
    }
}

#[test]
fn the_inverse_order_leads_back_and_bad_numbers_are_seen() {
    let mut case = Case::new();
    let x = case.input("x", &Value::random(9, 5, 1));
    let order = case.input("order", &Value::ints(&[3, 1, 0, 2]));
    let inverse = case.input("inverse", &Value::ints(&[2, 1, 3, 0]));
    let bad = case.input("bad", &Value::ints(&[0, 4, -1, i32::MAX]));
    let segments = case.input("segments", &Value::ints(&[0, 4, 9]));
    let y = permute_rows(&mut case.graph, x, [order, inverse], segments).unwrap();
    let back = permute_rows(&mut case.graph, y, [inverse, order], segments).unwrap();
    let seen = permute_rows(&mut case.graph, x, [bad, bad], segments).unwrap();
    case.output("y", y);
    case.output("back", back);
    case.output("seen", seen);
    case.run_everywhere(|_, out| {
        let x = Value::random(9, 5, 1);
        assert_eq!(out["back"].data, x.data);
        assert_ne!(out["y"].data, x.data);
        for (row, values) in out["seen"].data.chunks(5).enumerate() {
            let there = [true, false, false, false, true, false, false, false, true][row];
            assert!(values.iter().all(|v| v.is_nan() != there), "row {row}");
        }
    });
    let message = permute_rows(&mut case.graph, x, [order, segments], segments).unwrap_err().to_string();
    assert!(message.starts_with("permute_rows: the inverse order must"), "{message}");
}
