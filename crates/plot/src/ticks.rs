//! Where an axis has its marks, and what stands there.

/// Round numbers inside a range, at most about `most` of them.
pub fn linear(low: f64, high: f64, most: usize) -> Vec<(f64, String)> {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return vec![(low, number(low, 2))];
    }
    let rough = span / most.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough * 0.999).unwrap_or(power);
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|i| (i as f64 * step, number(i as f64 * step, decimals))).collect()
}

/// Powers of ten inside a range, at most about `most` of them; within two decades also 2 and 5 times these.
pub fn logarithmic(low: f64, high: f64, most: usize) -> Vec<(f64, String)> {
    let (first, last) = ((low.log10() - 1e-9).ceil() as i32, (high.log10() + 1e-9).floor() as i32);
    if last - first < 1 {
        let multiples = (first - 1..=last + 1).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e)));
        let inside = multiples.filter(|v| (low * 0.999..=high * 1.001).contains(v));
        return inside.map(|v| (v, number(v, (-v.log10().floor()).max(0.0) as usize))).collect();
    }
    let stride = ((last - first) as usize / most.max(1) + 1) as i32;
    (first..=last).filter(|e| e.rem_euclid(stride) == 0).map(|e| (10f64.powi(e), power_of_ten(e))).collect()
}

/// `10⁻³`.
pub fn power_of_ten(exponent: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let digits = exponent.unsigned_abs().to_string();
    let raised = digits.chars().filter_map(|c| c.to_digit(10)).map(|d| DIGITS[d as usize]);
    let sign = if exponent < 0 { "⁻" } else { "" };
    format!("10{sign}{}", raised.collect::<String>())
}

/// A number with a real minus sign, and commas between groups of three digits.
fn number(value: f64, decimals: usize) -> String {
    let text = format!("{:.decimals$}", value.abs());
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), String::new()), |(w, r)| (w, format!(".{r}")));
    let groups: Vec<&str> =
        whole.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default()).collect();
    let negative = value < 0.0 && text.bytes().any(|b| (b'1'..=b'9').contains(&b));
    format!("{}{}{rest}", if negative { "−" } else { "" }, groups.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: Vec<(f64, String)>) -> Vec<String> {
        ticks.into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn marks_are_round() {
        assert_eq!(labels(linear(-1.0, 1.0, 4)), ["−1.0", "−0.5", "0.0", "0.5", "1.0"]);
        assert_eq!(labels(linear(0.0, 20_000.0, 4)), ["0", "5,000", "10,000", "15,000", "20,000"]);
        assert_eq!(labels(logarithmic(1e-3, 1.0, 8)), ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]);
        assert_eq!(labels(logarithmic(0.04, 0.6, 8)), ["0.05", "0.1", "0.2", "0.5"]);
        assert_eq!(labels(linear(3.0, 3.0, 4)), ["3.00"]);
        assert!(logarithmic(1e-16, 1.0, 5).len() <= 6);
    }
}
