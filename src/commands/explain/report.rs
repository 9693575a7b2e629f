//! What an explanation is made of, and how it is told: text, checks and tables to stdout, a picture into a folder.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use hognose_plot::{Body, Figure, Picture};
use serde_json::{Value, json};

use crate::terminal::thousands;

/// Columns of the text.
const WIDTH: usize = 88;

/// What a step of the theory says, how it checks itself and what it shows.
#[derive(Default)]
pub struct Explanation {
    /// Paragraphs, parted by empty lines; lines that begin with a space are formulas and stay as they are.
    pub text: String,
    pub checks: Vec<Check>,
    pub tables: Vec<Table>,
    pub figure: Figure,
}

/// A number that was measured and the bound that it must keep.
pub struct Check {
    what: String,
    measured: f64,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Check {
    /// Passes where the measured number is not above the bound.
    pub fn at_most(what: impl Into<String>, measured: f64, bound: f64) -> Check {
        Check { what: what.into(), measured, bound: Bound::AtMost(bound) }
    }

    /// Passes where the measured number is not below the bound.
    pub fn at_least(what: impl Into<String>, measured: f64, bound: f64) -> Check {
        Check { what: what.into(), measured, bound: Bound::AtLeast(bound) }
    }

    /// NaN never passes.
    fn passed(&self) -> bool {
        match self.bound {
            Bound::AtMost(bound) => self.measured <= bound,
            Bound::AtLeast(bound) => self.measured >= bound,
        }
    }

    fn relation(&self) -> (&'static str, f64) {
        match self.bound {
            Bound::AtMost(bound) => ("≤", bound),
            Bound::AtLeast(bound) => ("≥", bound),
        }
    }
}

/// Numbers that were measured or counted, in rows.
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    /// A text or a number for each column.
    pub rows: Vec<Vec<Value>>,
}

impl Explanation {
    /// Writes the picture and prints everything.
    ///
    /// # Errors
    /// A check that failed, after all is written; the disk.
    pub fn publish(&self, name: &str, folder: &Path, as_json: bool, begin: Instant) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let (svg, png) = (folder.join(format!("{name}.svg")), folder.join(format!("{name}.png")));
        self.figure.write_svg(&svg)?;
        self.figure.write_png(&png)?;
        let seconds = begin.elapsed().as_secs_f64();
        let mut out = std::io::stdout().lock();
        if as_json {
            let checks: Vec<Value> = self.checks.iter().map(check_json).collect();
            let tables: Vec<Value> = self.tables.iter().map(table_json).collect();
            let object = json!({
                "name": name, "title": self.figure.title, "text": self.text.trim(), "checks": checks, "tables": tables,
                "figure": figure_json(&self.figure), "files": { "svg": svg, "png": png }, "seconds": seconds,
            });
            writeln!(out, "{object}")?;
        } else {
            writeln!(out, "{}\n\n{}", self.figure.title, wrap(&self.text))?;
            for table in &self.tables {
                writeln!(out, "{}", lay_out(table))?;
            }
            writeln!(out, "Checks")?;
            let widest = self.checks.iter().map(|c| c.what.chars().count()).max().unwrap_or(0);
            for check in &self.checks {
                let mark = if check.passed() { "passed" } else { "FAILED" };
                let gap = " ".repeat(widest - check.what.chars().count());
                let (relation, bound) = check.relation();
                writeln!(
                    out,
                    "  {mark}  {}{gap}  {:>9} {relation} {}",
                    check.what,
                    short(check.measured),
                    short(bound)
                )?;
            }
            writeln!(out, "\n{} and {}, in {seconds:.1} s", svg.display(), png.display())?;
        }
        let failed: Vec<&str> = self.checks.iter().filter(|c| !c.passed()).map(|c| c.what.as_str()).collect();
        anyhow::ensure!(
            failed.is_empty(),
            "{} of {} checks failed: {}",
            failed.len(),
            self.checks.len(),
            failed.join("; ")
        );
        Ok(())
    }
}

fn check_json(check: &Check) -> Value {
    let (relation, bound) = check.relation();
    json!({
        "what": check.what, "measured": check.measured, "relation": relation, "bound": bound, "passed": check.passed(),
    })
}

fn table_json(table: &Table) -> Value {
    json!({ "title": table.title, "columns": table.columns, "rows": table.rows })
}

/// The numbers behind the picture, for whoever draws it anew.
fn figure_json(figure: &Figure) -> Value {
    let panel = |panel: &hognose_plot::Panel| match &panel.body {
        Body::Chart(chart) => {
            let series: Vec<Value> =
                chart.series.iter().map(|s| json!({ "name": s.name, "points": s.points })).collect();
            json!({ "title": panel.title, "x": chart.x.label, "y": chart.y.label, "series": series })
        }
        Body::Heat(heat) => json!({
            "title": panel.title, "x": heat.x_label, "y": heat.y_label, "colour": heat.bar_label, "values": heat.values,
        }),
    };
    let panels: Vec<Value> = figure.rows.iter().flat_map(|row| row.1.iter().map(panel)).collect();
    json!({ "title": figure.title, "subtitle": figure.subtitle, "panels": panels })
}

/// Paragraphs in lines of at most [`WIDTH`] characters, each with an empty line behind it.
fn wrap(text: &str) -> String {
    let mut out = String::new();
    let mut length = 0;
    for line in text.trim().lines() {
        let verbatim = line.is_empty() || line.starts_with(' ');
        if verbatim {
            if length > 0 {
                out.push('\n');
            }
            out.push_str(line);
            out.push('\n');
            length = 0;
            continue;
        }
        for word in line.split_whitespace() {
            let width = word.chars().count();
            if length > 0 && length + 1 + width > WIDTH {
                out.push('\n');
                length = 0;
            }
            if length > 0 {
                out.push(' ');
                length += 1;
            }
            out.push_str(word);
            length += width;
        }
    }
    if length > 0 {
        out.push('\n');
    }
    out
}

/// A table for a terminal: texts to the left, numbers to the right.
fn lay_out(table: &Table) -> String {
    let cell = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.as_f64().map_or_else(|| "–".into(), short),
    };
    let rows: Vec<Vec<String>> = table.rows.iter().map(|row| row.iter().map(cell).collect()).collect();
    let width = |col: usize| {
        let cells = rows.iter().filter_map(|row| row.get(col)).chain([&table.columns[col]]);
        cells.map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let mut out = format!("{}\n", table.title);
    let mut line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(col, (cell, width))| {
            let text = table.rows.iter().all(|row| row.get(col).is_none_or(Value::is_string));
            if text { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        out.push_str(&format!("  {}\n", padded.collect::<Vec<_>>().join("  ").trim_end()));
    };
    line(&table.columns);
    rows.iter().for_each(|row| line(row));
    out
}

/// A number as short as it can be understood: whole ones with commas, others with three digits.
pub fn short(value: f64) -> String {
    let size = value.abs();
    let scientific = format!("{value:.2e}");
    // The exponent after rounding: 0.9997 is 1.00.
    let exponent = scientific.split_once('e').and_then(|(_, e)| e.parse::<i32>().ok()).unwrap_or(0);
    if value == 0.0 {
        "0".into()
    } else if value.fract() == 0.0 && size < 1e9 {
        format!("{}{}", if value < 0.0 { "−" } else { "" }, thousands(size as u64))
    } else if (-3..6).contains(&exponent) {
        format!("{value:.*}", (2 - exponent).max(0) as usize)
    } else {
        format!("{value:.0e}")
    }
}

/// A share in percent, with two digits.
pub fn percent(value: f64) -> String {
    let exponent = format!("{:.1e}", 100.0 * value).split_once('e').and_then(|(_, e)| e.parse::<i32>().ok());
    format!("{:.*} %", (1 - exponent.unwrap_or(0)).max(0) as usize, 100.0 * value)
}

/// Times of calls in seconds: the least of at least three and of a twentieth of a second.
pub fn seconds(mut call: impl FnMut()) -> f64 {
    let (begin, mut least, mut calls) = (Instant::now(), f64::INFINITY, 0);
    while calls < 3 || (begin.elapsed().as_secs_f64() < 0.05 && calls < 1000) {
        let start = Instant::now();
        call();
        least = least.min(start.elapsed().as_secs_f64());
        calls += 1;
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let found = [0.0, 12_345.0, 0.123_456, 0.9999, 1234.5678, 3.2e-14, 7.9e12, -3.0].map(short);
        assert_eq!(found, ["0", "12,345", "0.123", "1.00", "1235", "3e-14", "8e12", "−3"]);
        assert_eq!([0.6189, 0.0123, 0.0000294].map(percent), ["62 %", "1.2 %", "0.0029 %"]);
    }

    #[test]
    fn text_is_wrapped_and_formulas_are_not() {
        let long = "word ".repeat(40);
        let wrapped = wrap(&format!("{long}\n\n  a  =  b\n\nend"));
        assert!(wrapped.lines().all(|l| l.chars().count() <= WIDTH) && wrapped.ends_with("\n\n  a  =  b\n\nend\n"));
    }

    #[test]
    fn what_is_not_a_number_never_passes() {
        assert!(!Check::at_most("", f64::NAN, 1.0).passed() && !Check::at_least("", f64::NAN, 1.0).passed());
        assert!(Check::at_most("", 1.0, 1.0).passed() && !Check::at_least("", 0.9, 1.0).passed());
    }
}
