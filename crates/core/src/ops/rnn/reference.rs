//! LSTM and GRU in plain f64: what the kernels are tested against.

use std::ops::Range;

use super::Cell;

/// Operands as in [`super::RnnScan`], row-major.
pub struct Operands<'a> {
    pub cell: Cell,
    /// H.
    pub units: usize,
    pub x: &'a [f64],
    pub weight: &'a [f64],
    pub bias: Option<&'a [f64]>,
    pub initial_state: Option<&'a [f64]>,
    pub segments: &'a [Range<usize>],
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// y `[T, H]` and the final states.
pub fn rnn_scan(op: &Operands) -> (Vec<f64>, Vec<f64>) {
    let (h, width, state) = (op.units, op.cell.gates() * op.units, op.cell.state() * op.units);
    let mut y = vec![0.0; op.x.len() / width.max(1) * h];
    let mut last = Vec::new();
    for (s, rows) in op.segments.iter().enumerate() {
        let mut now = op.initial_state.map_or(vec![0.0; state], |initial| initial[s * state..][..state].to_vec());
        for t in rows.clone() {
            let x = &op.x[t * width..][..width];
            let a: Vec<f64> = (0..width)
                .map(|i| {
                    let product: f64 = (0..h).map(|k| op.weight[i * h + k] * now[k]).sum();
                    product + op.bias.map_or(0.0, |b| b[i])
                })
                .collect();
            let sum = |gate: usize, i: usize| x[gate * h + i] + a[gate * h + i];
            for i in 0..h {
                match op.cell {
                    Cell::Lstm => {
                        let input = sigmoid(sum(0, i)) * sum(2, i).tanh();
                        now[h + i] = sigmoid(sum(1, i)) * now[h + i] + input;
                        now[i] = sigmoid(sum(3, i)) * now[h + i].tanh();
                    }
                    Cell::Gru => {
                        let (r, z) = (sigmoid(sum(0, i)), sigmoid(sum(1, i)));
                        let n = (x[2 * h + i] + r * a[2 * h + i]).tanh();
                        now[i] = (1.0 - z) * n + z * now[i];
                    }
                }
            }
            y[t * h..][..h].copy_from_slice(&now[..h]);
        }
        last.extend(now);
    }
    (y, last)
}
