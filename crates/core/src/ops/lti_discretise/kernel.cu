// The discretisation and its gradient in f64: a thread takes a channel. It is tiny beside the scan that follows. The
// formulas stand in mod.rs and cpu.rs.
//
// Macros: PAIRS; ZOH 0 or 1; LOW_RANK 0 or 1.

struct Complex {
    double re, im;
};
DEVICE Complex operator+(Complex a, Complex b) { return Complex{a.re + b.re, a.im + b.im}; }
DEVICE Complex operator-(Complex a, Complex b) { return Complex{a.re - b.re, a.im - b.im}; }
DEVICE Complex operator*(Complex a, Complex b) { return Complex{a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
DEVICE Complex operator*(double s, Complex a) { return Complex{s * a.re, s * a.im}; }
DEVICE Complex real(double x) { return Complex{x, 0.0}; }
DEVICE Complex conj(Complex a) { return Complex{a.re, -a.im}; }
DEVICE double norm2(Complex a) { return a.re * a.re + a.im * a.im; }
DEVICE Complex inverse(Complex a) { return (1.0 / norm2(a)) * conj(a); }
// The real part of a* · b.
DEVICE double dot(Complex a, Complex b) { return a.re * b.re + a.im * b.im; }
DEVICE Complex complex_exp(Complex z) {
    double size = exp(z.re);
    return Complex{size * cos(z.im), size * sin(z.im)};
}

// (e^z - 1)/z and its derivative, from their series where |z| is small.
DEVICE Complex phi(Complex z) {
    if (norm2(z) < 1e-4) {
        Complex sum = real(1.0);
        for (int n = 6; n >= 2; n--) sum = real(1.0) + (1.0 / n) * (z * sum);
        return sum;
    }
    return (complex_exp(z) - real(1.0)) * inverse(z);
}
DEVICE Complex phi_slope(Complex z) {
    if (norm2(z) < 1e-4) {
        // Σ z^n / (n! (n + 2))
        Complex sum = real(0.0), power = real(1.0);
        for (int n = 0; n < 6; n++) {
            sum = sum + (1.0 / (n + 2)) * power;
            power = (1.0 / (n + 1)) * (power * z);
        }
        return sum;
    }
    return (complex_exp(z) - phi(z)) * inverse(z);
}

struct Parameters {
    Mat<float> log_a_real, a_imag, log_dt, b, p;
    i64 channels;
};

DEVICE Complex pair_of(Mat<float> m, int pair, i64 channel, double otherwise) {
    if (!m.present()) return real(otherwise);
    return Complex{m.row(2 * pair)[channel], m.row(2 * pair + 1)[channel]};
}
DEVICE void set_pair(Mat<float> m, int pair, i64 channel, Complex z) {
    if (!m.present()) return;
    m.row(2 * pair)[channel] = static_cast<float>(z.re);
    m.row(2 * pair + 1)[channel] = static_cast<float>(z.im);
}
DEVICE Complex lambda_of(const Parameters& in, int pair, i64 channel) {
    return Complex{-exp(static_cast<double>(in.log_a_real.row(pair)[channel])), in.a_imag.row(pair)[channel]};
}
// E = 1/(1 - z/2).
DEVICE Complex e_of(const Parameters& in, int pair, i64 channel, double delta) {
    return inverse(real(1.0) - (0.5 * delta) * lambda_of(in, pair, channel));
}

// γ and ρ of the part of rank one.
DEVICE void low_rank_sums(const Parameters& in, i64 channel, double delta, double& gamma, double& rho) {
    double pp = 0.0, pb = 0.0;
    for (int m = 0; m < PAIRS; m++) {
        Complex e = e_of(in, m, channel, delta), p = pair_of(in.p, m, channel, 0.0);
        pp += 2.0 * dot(p, e * p);
        pb += 2.0 * dot(p, e * pair_of(in.b, m, channel, 1.0));
    }
    gamma = 1.0 / (2.0 / delta + pp), rho = pb;
}

struct Coefficients {
    Mat<float> a, b, u, v;
};

KERNEL __launch_bounds__(64) discretise(Parameters in, Coefficients out) {
    i64 channel = static_cast<i64>(blockIdx.x) * 64 + threadIdx.x;
    if (channel >= in.channels) return;
    double delta = exp(static_cast<double>(in.log_dt.data[channel])), gamma = 0.0, rho = 0.0;
    if (LOW_RANK) low_rank_sums(in, channel, delta, gamma, rho);
    for (int m = 0; m < PAIRS; m++) {
        Complex b = pair_of(in.b, m, channel, 1.0);
        if (ZOH) {
            Complex z = delta * lambda_of(in, m, channel);
            set_pair(out.a, m, channel, complex_exp(z));
            set_pair(out.b, m, channel, delta * (phi(z) * b));
            continue;
        }
        Complex e = e_of(in, m, channel, delta), p = pair_of(in.p, m, channel, 0.0);
        set_pair(out.a, m, channel, 2.0 * e - real(1.0));
        set_pair(out.b, m, channel, delta * (e * (b - (gamma * rho) * p)));
        if (LOW_RANK) {
            set_pair(out.u, m, channel, (-2.0 * gamma) * (e * p));
            set_pair(out.v, m, channel, e * conj(p));
        }
    }
}

struct Gradients {
    Mat<float> da, db_bar, du, dv, dlog_a_real, da_imag, dlog_dt, db, dp;
};

KERNEL __launch_bounds__(64) discretise_grad(Parameters in, Gradients grad) {
    i64 channel = static_cast<i64>(blockIdx.x) * 64 + threadIdx.x;
    if (channel >= in.channels) return;
    double delta = exp(static_cast<double>(in.log_dt.data[channel])), d_delta = 0.0;
    double gamma = 0.0, rho = 0.0, d_gamma = 0.0, d_rho = 0.0, d_sum = 0.0;
    if (LOW_RANK) {
        low_rank_sums(in, channel, delta, gamma, rho);
        for (int m = 0; m < PAIRS; m++) {
            Complex e = e_of(in, m, channel, delta), p = pair_of(in.p, m, channel, 0.0);
            Complex dq = conj(delta * e) * pair_of(grad.db_bar, m, channel, 0.0);
            d_gamma -= rho * dot(p, dq) + 2.0 * dot(e * p, pair_of(grad.du, m, channel, 0.0));
            d_rho -= gamma * dot(p, dq);
        }
        d_sum = -gamma * gamma * d_gamma;
        d_delta -= d_sum * 2.0 / (delta * delta);
    }
    for (int m = 0; m < PAIRS; m++) {
        Complex lambda = lambda_of(in, m, channel), b = pair_of(in.b, m, channel, 1.0), z = delta * lambda, dz, db;
        Complex da = pair_of(grad.da, m, channel, 0.0), db_bar = pair_of(grad.db_bar, m, channel, 0.0);
        if (ZOH) {
            Complex f = phi(z);
            dz = conj(complex_exp(z)) * da + conj(delta * (phi_slope(z) * b)) * db_bar;
            d_delta += dot(f * b, db_bar);
            db = conj(delta * f) * db_bar;
        } else {
            Complex e = e_of(in, m, channel, delta), p = pair_of(in.p, m, channel, 0.0);
            Complex du = pair_of(grad.du, m, channel, 0.0), dv = pair_of(grad.dv, m, channel, 0.0);
            Complex q = b - (gamma * rho) * p, dq = conj(delta * e) * db_bar;
            Complex de = 2.0 * da + conj(delta * q) * db_bar - (2.0 * gamma) * (conj(p) * du) + p * dv +
                         (2.0 * d_rho) * (p * conj(b)) + real(2.0 * d_sum * norm2(p));
            d_delta += dot(e * q, db_bar);
            db = dq + (2.0 * d_rho) * (p * conj(e));
            Complex dp = (2.0 * d_rho) * (e * b) + (4.0 * d_sum * e.re) * p - (gamma * rho) * dq -
                         (2.0 * gamma) * (conj(e) * du) + e * conj(dv);
            set_pair(grad.dp, m, channel, dp);
            dz = conj(0.5 * (e * e)) * de;
        }
        d_delta += dot(lambda, dz);
        set_pair(grad.db, m, channel, db);
        if (grad.dlog_a_real.present())
            grad.dlog_a_real.row(m)[channel] = static_cast<float>(delta * dz.re * lambda.re);
        if (grad.da_imag.present()) grad.da_imag.row(m)[channel] = static_cast<float>(delta * dz.im);
    }
    if (grad.dlog_dt.present()) grad.dlog_dt.data[channel] = static_cast<float>(d_delta * delta);
}
