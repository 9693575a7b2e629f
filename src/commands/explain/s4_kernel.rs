//! `hognose explain s4-kernel`: one kernel in three ways, and diagonal models.

use hognose_plot::{Axis, Chart, Figure, Heat, Legend, Mark, Palette, Panel, Series};
use hognose_theory::discretise::Method;
use hognose_theory::hippo::Measure;
use hognose_theory::nalgebra::{DMatrix, DVector};
use hognose_theory::random::Random;
use hognose_theory::s4::{Dplr, kernel_by_generating_function, kernel_by_powers, low_rank};
use hognose_theory::s4d::{Init, S4d};
use hognose_theory::ssm::Continuous;
use hognose_theory::{Complex64, relative_error};
use serde_json::json;

use super::report::{Check, Explanation, Table, seconds};
use crate::args::ExplainArgs;

const LENGTH: usize = 256;
const DELTA: f64 = 0.01;
const STATES: usize = 64;
const INITS: [(&str, Init); 5] =
    [("Lin", Init::Lin), ("Inv", Init::Inv), ("LegS", Init::LegS), ("Real", Init::Real), ("random", Init::Random(3))];

/// The three ways to a kernel, for one size of state.
struct Ways {
    states: usize,
    powers: f64,
    /// Left out where it takes too long.
    generating: Option<f64>,
    cauchy: f64,
}

pub fn explain(_: &ExplainArgs) -> anyhow::Result<Explanation> {
    let model = legs(STATES)?;
    let dplr = Dplr::legs(&model.c)?;
    let powers = kernel_by_powers(&model, DELTA, LENGTH)?;
    let generating = kernel_by_generating_function(&model, DELTA, LENGTH)?;
    let cauchy = dplr.kernel(DELTA, LENGTH)?;

    let rebuilt = (dplr.dense() - model.a.map(Complex64::from)).map(|v| v.norm()).max() / model.a.abs().max();
    let unitary = (dplr.v.adjoint() * &dplr.v - DMatrix::identity(STATES, STATES)).map(|v| v.norm()).max();
    let small = Dplr::legs(&DVector::zeros(8))?;
    let spectrum: Vec<f64> = small.lambda.iter().map(|l| l.im).filter(|im| *im > 0.0).collect();
    let published = [0.427_489, 1.957_794, 5.354_209, 19.857_410];
    let off_spectrum = spectrum.iter().zip(published).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let mut diagonal: f64 = 0.0;
    for (_, init) in INITS {
        for method in [Method::ZeroOrderHold, Method::BILINEAR] {
            let model = S4d::new(init, 16, 2)?;
            let dense = model.dense()?.discretise(method, 0.03)?.kernel(200);
            diagonal = diagonal.max(relative_error(&model.kernel(method, 0.03, 200)?, &dense));
        }
    }
    let checks = vec![
        Check::at_most("generating function and dense powers differ by", relative_error(&generating, &powers), 1e-9),
        Check::at_most(
            "Cauchy products with Woodbury and dense powers differ by",
            relative_error(&cauchy, &powers),
            1e-9,
        ),
        Check::at_most("V(Λ − P P*)V* and HiPPO-LegS differ by", rebuilt, 1e-12),
        Check::at_most("V*V and I differ by", unitary, 1e-12),
        Check::at_most("Λ for N = 8, against its published imaginary parts", off_spectrum, 1e-6),
        Check::at_most("S4D: all kernels by Vandermonde products and dense ones differ by", diagonal, 1e-11),
    ];

    let mut ways = Vec::new();
    for states in [8, 16, 32, 64, 128] {
        let model = legs(states)?;
        let dplr = Dplr::legs(&model.c)?;
        let truncated = dplr.truncated(DELTA, LENGTH)?;
        let generating = || seconds(|| drop(kernel_by_generating_function(&model, DELTA, LENGTH)));
        ways.push(Ways {
            states,
            powers: seconds(|| drop(kernel_by_powers(&model, DELTA, LENGTH))),
            generating: (states <= STATES).then(generating),
            cauchy: seconds(|| drop(dplr.kernel_of(&truncated, DELTA, LENGTH))),
        });
    }
    let text = format!(
        "A convolution needs its kernel K̄ = (C B̄, C Ā B̄, …, C Ā^(L−1) B̄). By powers of a dense Ā that is N² L multiply-adds, one after \
         another. S4 gets all of it at once, from its generating function at the L-th roots of unity z, followed by an inverse FFT:

  K̂(z) = Σ K̄_k z^k = C̃ (I − Ā z)⁻¹ B̄               C̃ = C (I − Ā^L)

A dense inverse a frequency would cost N³. But HiPPO-LegS is a normal matrix plus one of rank 1, and a normal matrix has \
orthonormal eigenvectors, so it can be made diagonal in floating point, which A itself cannot:

  A + P Pᵀ = −½ I + S,  Sᵀ = −S,  P_n = √(n + ½)      A = V (Λ − P P*) V*

With the bilinear step and Woodbury's identity for the rank-1 part, four Cauchy products c_ij of O(N) remain for a frequency:

  K̂(z) = 2/(1+z) · [c00 − c01 (1 + c11)⁻¹ c10]
  c_ij = Σ_n (row)_n (column)_n / (g − λ_n)            g = (2/Δ) (1 − z)/(1 + z)

All three are the same kernel: they differ by {:.0e} and {:.0e} for N = {STATES}, L = {LENGTH}. S4 learns C̃ itself, so it needs no \
power of Ā; its work grows with N, that of dense powers with N².

S4D leaves the rank-1 part out: A is diagonal, and its kernel one product with a Vandermonde matrix, K̄_k = 2 Re Σ C_n B̄_n exp(kΔ λ_n). \
What matters is where the λ start. Lin: −½ + iπn. Inv: −½ + i(N/π)(N/(2n+1) − 1). LegS: the Λ above. Real: −(n+1), without \
oscillation; that is where Mamba's A starts, the diagonal of HiPPO-LegS.",
        relative_error(&generating, &powers),
        relative_error(&cauchy, &powers),
    );
    let rows = ways.iter().map(|w| {
        let milli = |s: Option<f64>| json!(s.map(|s| 1e3 * s));
        vec![json!(w.states), milli(Some(w.powers)), milli(w.generating), milli(Some(w.cauchy))]
    });
    let table = Table {
        title: format!("Milliseconds for a kernel of length {LENGTH} (f64, one core; C̃ given, as S4 learns it)"),
        columns: ["N", "dense powers", "generating function", "Cauchy and Woodbury"].map(String::from).into(),
        rows: rows.collect(),
    };
    let kernels = [&powers, &generating, &cauchy];
    Ok(Explanation { text, checks, tables: vec![table], figure: figure(kernels, &ways)? })
}

/// HiPPO-LegS with a random output row.
fn legs(states: usize) -> anyhow::Result<Continuous> {
    let (a, b) = Measure::LegS.transition(states)?;
    Ok(Continuous::new(a, b, DVector::from_vec(Random::new(5).normals(states)), 0.0)?)
}

fn figure([powers, generating, cauchy]: [&Vec<f64>; 3], ways: &[Ways]) -> anyhow::Result<Figure> {
    let size = 24;
    let (a, _) = Measure::LegS.transition(size)?;
    let p = low_rank(size);
    let skew = &a + &p * p.transpose() + DMatrix::identity(size, size) * 0.5;
    let matrix = |title: &str, m: &DMatrix<f64>, range: f64| {
        let row = |i: usize| (0..size).map(|j| Some(m[(i, j)])).collect();
        Panel::heat(
            title,
            Heat {
                values: (0..size).map(row).collect(),
                palette: Palette::Diverging,
                range: (-range, range),
                square: true,
                ..Heat::default()
            },
        )
    };
    let mut spectra = Vec::new();
    for (i, (name, init)) in INITS.iter().enumerate() {
        let real = *init == Init::Real;
        let mut values: Vec<f64> = init.diagonal(STATES)?.iter().map(|l| if real { -l.re } else { l.im }).collect();
        values.sort_by(f64::total_cmp);
        let points = values.iter().take(STATES / 2).enumerate().map(|(n, v)| (n as f64, *v));
        let name = if real { "Real: −λ".into() } else { format!("{name}: Im λ") };
        spectra.push(Series::line(name, i, points).mark(if real { Mark::Dashed } else { Mark::LineDots }));
    }
    let spectra = Chart {
        x: Axis::linear("n, sorted"),
        y: Axis::log("frequency or decay"),
        series: spectra,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let every = |y: &[f64], first: usize| -> Vec<(f64, f64)> {
        y.iter().enumerate().skip(first).step_by(6).map(|(k, v)| (k as f64, *v)).collect()
    };
    let kernel = Chart {
        x: Axis::linear("step k"),
        y: Axis::linear("weight"),
        series: vec![
            Series::line("dense powers", 0, powers.iter().enumerate().map(|(k, v)| (k as f64, *v))),
            Series::line("generating function", 1, every(generating, 0)).mark(Mark::Dots),
            Series::line("Cauchy and Woodbury", 2, every(cauchy, 3)).mark(Mark::Dots),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let line = |name: &str, color, time: &dyn Fn(&Ways) -> Option<f64>| {
        Series::line(name, color, ways.iter().filter_map(|w| Some((w.states as f64, 1e3 * time(w)?))))
            .mark(Mark::LineDots)
    };
    let times = Chart {
        x: Axis::log("N").ticks(ways.iter().map(|w| (w.states as f64, w.states.to_string()))),
        y: Axis::log("ms"),
        series: vec![
            line("dense powers", 0, &|w| Some(w.powers)),
            line("generating function", 1, &|w| w.generating),
            line("Cauchy", 2, &|w| Some(w.cauchy)),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let mut stacked = Vec::new();
    let mut notes = Vec::new();
    for (i, (name, init)) in INITS.iter().enumerate() {
        let mut model = S4d::new(*init, 32, 1)?;
        model.c.iter_mut().for_each(|c| *c = 1.0.into());
        let kernel = model.kernel(Method::ZeroOrderHold, 0.002, 1400)?;
        let largest = kernel.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let base = -(i as f64) * 1.3;
        stacked.push(Series::line(
            "",
            i,
            kernel.iter().enumerate().map(|(k, v)| (k as f64 * 0.002, base + v / largest)),
        ));
        notes.push((2.3, base + 0.32, (*name).to_string()));
    }
    let stacked = Chart {
        x: Axis::linear("time"),
        y: Axis::linear("weight / largest").ticks([]),
        series: stacked,
        notes,
        ..Chart::default()
    };
    Ok(Figure {
        title: "S4: the kernel of a long convolution".into(),
        subtitle: "HiPPO-LegS is a normal matrix plus one of rank 1, so its kernel takes Cauchy products; S4D keeps the diagonal alone".into(),
        rows: vec![
            (
                1.0,
                vec![
                    matrix("HiPPO-LegS: A", &a, 45.0),
                    matrix("A + P Pᵀ + I/2 is skew-symmetric", &skew, 25.0),
                    Panel::chart("S4D: where the diagonal starts", spectra),
                ],
            ),
            (
                1.0,
                vec![
                    Panel::chart("One kernel, three ways", kernel).weight(1.25),
                    Panel::chart("Time for it", times).weight(0.8),
                    Panel::chart("S4D kernels (N = 32, B = C = 1)", stacked).weight(0.95),
                ],
            ),
        ],
    })
}
