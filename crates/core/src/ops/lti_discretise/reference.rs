//! The discretisation of one channel in f64: what the op computes on a CPU, too.

use num_complex::Complex64;

use super::Method;

/// |Δλ| below which quotients are taken from their series.
const SERIES: f64 = 0.01;

/// The parameters of one channel, an element for each pair of states.
#[derive(Clone, Debug)]
pub struct Channel {
    pub lambda: Vec<Complex64>,
    pub delta: f64,
    pub b: Vec<Complex64>,
    /// P of the rank-one part.
    pub p: Option<Vec<Complex64>>,
}

/// The coefficients of one channel. u and v are empty without P.
#[derive(Clone, Debug)]
pub struct Coefficients {
    pub a: Vec<Complex64>,
    pub b: Vec<Complex64>,
    pub u: Vec<Complex64>,
    pub v: Vec<Complex64>,
}

/// ā, b̄, u and v; the formulas stand at [`super`]. P goes with [`Method::Bilinear`].
pub fn discretise(method: Method, channel: &Channel) -> Coefficients {
    let Channel { lambda, delta, b, p } = channel;
    let z: Vec<Complex64> = lambda.iter().map(|l| l * delta).collect();
    if method == Method::Zoh {
        let a = z.iter().map(|z| z.exp()).collect();
        let b = z.iter().zip(b).map(|(&z, b)| delta * phi(z) * b).collect();
        return Coefficients { a, b, u: vec![], v: vec![] };
    }
    let e: Vec<Complex64> = z.iter().map(|&z| inverse(z)).collect();
    let a = e.iter().map(|e| 2.0 * e - 1.0).collect();
    let Some(p) = p else {
        let b = e.iter().zip(b).map(|(e, b)| delta * e * b).collect();
        return Coefficients { a, b, u: vec![], v: vec![] };
    };
    let (gamma, rho) = low_rank_sums(*delta, &e, b, p);
    Coefficients {
        a,
        b: (0..e.len()).map(|m| delta * e[m] * (b[m] - gamma * rho * p[m])).collect(),
        u: e.iter().zip(p).map(|(e, p)| -2.0 * gamma * e * p).collect(),
        v: e.iter().zip(p).map(|(e, p)| e * p.conj()).collect(),
    }
}

/// E = 1/(1 − z/2).
pub(super) fn inverse(z: Complex64) -> Complex64 {
    (1.0 - z / 2.0).inv()
}

/// γ = 1/(2/Δ + 2 Re(p* · E p)) and ρ = 2 Re(p* · E b).
pub(super) fn low_rank_sums(delta: f64, e: &[Complex64], b: &[Complex64], p: &[Complex64]) -> (f64, f64) {
    let twice_real = |x: &[Complex64]| 2.0 * (0..e.len()).map(|m| (p[m].conj() * e[m] * x[m]).re).sum::<f64>();
    (1.0 / (2.0 / delta + twice_real(p)), twice_real(b))
}

/// (eᶻ − 1)/z.
pub(super) fn phi(z: Complex64) -> Complex64 {
    if z.norm() < SERIES {
        return 1.0 + z / 2.0 * (1.0 + z / 3.0 * (1.0 + z / 4.0 * (1.0 + z / 5.0 * (1.0 + z / 6.0))));
    }
    (z.exp() - 1.0) / z
}

/// Its derivative, (eᶻ − (eᶻ − 1)/z)/z.
pub(super) fn phi_slope(z: Complex64) -> Complex64 {
    if z.norm() < SERIES {
        return 0.5 + z * (1.0 / 3.0 + z * (1.0 / 8.0 + z * (1.0 / 30.0 + z * (1.0 / 144.0 + z / 840.0))));
    }
    (z.exp() - phi(z)) / z
}
