//! What a person sees on the terminal: progress bars and numbers in words. All of it goes to stderr.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C (and a request to terminate, as a scheduler sends it) ask for an orderly end; a second one ends the program
/// at once.
pub fn catch_interrupts() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })?;
    Ok(())
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// A progress bar over `length` units, hidden where stderr is no terminal.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(8));
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("━╸─"));
    bar
}

/// A path as a shell takes it.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    if text.chars().all(|c| c.is_alphanumeric() || "/._-+=:@%,".contains(c)) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// `2m 05s`, `1h 02m`, `12s`.
pub fn duration(seconds: f64) -> String {
    let total = Duration::from_secs_f64(seconds.clamp(0.0, 1e9)).as_secs();
    match (total / 3600, total / 60 % 60, total % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) => format!("{h}h {m:02}m"),
    }
}

/// `1,364,035`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `1.2 GFLOP/s`, `3.4 TFLOP`: a number with an SI prefix before its unit.
pub fn si(value: f64, unit: &str) -> String {
    let steps = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match steps.iter().find(|(size, _)| value >= *size) {
        Some((size, prefix)) => format!("{:.1} {prefix}{unit}", value / size),
        None => format!("{value:.1} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_words() {
        assert_eq!([0.4, 65.0, 3725.0].map(duration), ["0s", "1m 05s", "1h 02m"]);
        assert_eq!([7, 1000, 1_364_035].map(thousands), ["7", "1,000", "1,364,035"]);
        assert_eq!(si(2.34e9, "FLOP/s"), "2.3 GFLOP/s");
        assert_eq!(si(12.0, "B"), "12.0 B");
    }

    #[test]
    fn paths_for_a_shell() {
        let words = ["runs/tiny-2", "runs/ünï", "my runs/a", "it's"].map(|p| quoted(Path::new(p)));
        assert_eq!(words, ["runs/tiny-2", "runs/ünï", "'my runs/a'", r"'it'\''s'"]);
    }
}
