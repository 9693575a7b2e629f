//! The picture of the loss curves.

use std::ops::Range;
use std::path::Path;

use hognose_plot::{BLUE, FONT, GREEN, GRID, INK, PURPLE, Picture, VERMILION};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Metrics, RecordError};

/// More points than this are drawn as means of neighbours; there are no more pixels.
const POINTS: usize = 3000;

/// Loss curves and the learning rate below them. Points are (step, value).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossPlot {
    /// Stands above the curves.
    pub title: String,
    /// What the upper axis says, such as "bits per byte".
    pub unit: String,
    /// Loss on training text by step.
    pub training: Vec<(u64, f64)>,
    /// Loss on held-out text by step.
    pub validation: Vec<(u64, f64)>,
    /// Learning rate by step.
    pub learning_rate: Vec<(u64, f64)>,
    /// Horizontal lines with their names.
    pub references: Vec<(String, f64)>,
}

impl LossPlot {
    /// The curves of a run: in bits per byte where these were measured, else in nats per token.
    pub fn new(title: impl Into<String>, metrics: &[Metrics]) -> Self {
        let curve = |value: fn(&Metrics) -> Option<f64>| -> Vec<(u64, f64)> {
            metrics
                .iter()
                .filter_map(|m| value(m).filter(|value| value.is_finite()).map(|value| (m.step, value)))
                .collect()
        };
        let in_bytes = metrics.iter().any(|m| m.bits_per_byte.is_some() || m.validation_bits_per_byte.is_some());
        let (unit, training, validation) = if in_bytes {
            ("bits per byte", curve(|m| m.bits_per_byte), curve(|m| m.validation_bits_per_byte))
        } else {
            ("nats per token", curve(|m| m.loss), curve(|m| m.validation_loss))
        };
        Self {
            title: title.into(),
            unit: unit.to_owned(),
            training,
            validation,
            learning_rate: curve(|m| m.learning_rate),
            references: Vec::new(),
        }
    }

    /// Adds a horizontal line, such as what xz needs.
    pub fn reference(mut self, name: impl Into<String>, value: f64) -> Self {
        self.references.push((name.into(), value));
        self
    }

    /// Writes a PNG file; an old one is replaced when the new one is complete.
    ///
    /// # Errors
    /// [`RecordError::NothingToDraw`] without any point, [`RecordError::Picture`] otherwise.
    pub fn write_png(&self, path: &Path) -> Result<(), RecordError> {
        Ok(self.painting()?.write_png(path)?)
    }

    /// Writes an SVG file; an old one is replaced when the new one is complete.
    ///
    /// # Errors
    /// As [`LossPlot::write_png`].
    pub fn write_svg(&self, path: &Path) -> Result<(), RecordError> {
        Ok(self.painting()?.write_svg(path)?)
    }

    fn painting(&self) -> Result<Painting<'_>, RecordError> {
        let axes = self.axes().ok_or(RecordError::NothingToDraw)?;
        Ok(Painting { plot: self, axes })
    }

    /// The ranges of the axes; `None` without any point.
    fn axes(&self) -> Option<Axes> {
        let smooth = smooth(&self.training);
        let steps = self.training.iter().chain(&self.validation).map(|&(step, _)| step as f64);
        let last = steps.clone().fold(f64::NEG_INFINITY, f64::max);
        if !last.is_finite() {
            return None;
        }
        // The first steps fall from the loss of a uniform guess; they would press the rest flat, so the axis ends
        // where the smoothed curve is after a fiftieth of the run, and the curves leave the picture above it.
        let settled = smooth.iter().filter(|&&(step, _)| step >= last / 50.0).map(|&(_, value)| value);
        let shown = || {
            let validation = self.validation.iter().filter(|(step, _)| *step as f64 >= last / 50.0).map(|&(_, v)| v);
            settled.clone().chain(validation).chain(self.references.iter().map(|&(_, value)| value))
        };
        let high = shown().fold(f64::NEG_INFINITY, f64::max);
        let low = shown().fold(f64::INFINITY, f64::min);
        let margin = ((high - low) * 0.08).max(high.abs() * 0.01).max(1e-6);
        let rate = self.learning_rate.iter().map(|&(_, rate)| rate).fold(0.0, f64::max);
        Some(Axes {
            steps: 0.0..last.max(1.0),
            loss: (low - margin).max(0.0)..high + margin,
            rate: 0.0..if rate > 0.0 { rate * 1.1 } else { 1.0 },
            smooth,
        })
    }

    fn paint_loss<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
        axes: &Axes,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let mut chart = ChartBuilder::on(area)
            .set_label_area_size(LabelAreaPosition::Left, 100)
            .set_label_area_size(LabelAreaPosition::Bottom, 20)
            .build_cartesian_2d(axes.steps.clone(), axes.loss.clone())?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(INK.mix(0.6))
            .label_style((FONT, 20).into_font().color(&INK))
            .axis_desc_style((FONT, 22).into_font().color(&INK))
            .x_labels(8)
            .y_labels(8)
            .x_label_formatter(&|_| String::new())
            .y_label_formatter(&|value| format!("{value:.2}"))
            .y_desc(&self.unit)
            .draw()?;
        let top = axes.loss.end;
        for piece in clip(&thin(&self.training), &axes.loss) {
            chart.draw_series(LineSeries::new(piece, BLUE.mix(0.28).stroke_width(1)))?;
        }
        let mut curve = |points: &[(f64, f64)], color: RGBColor, name: &str| {
            let mut pieces = clip(points, &axes.loss).into_iter();
            let style = color.stroke_width(3);
            // An empty series still puts its name into the legend.
            let first = pieces.next().unwrap_or_default();
            chart
                .draw_series(LineSeries::new(first, style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 34, y)], color.stroke_width(4)));
            for piece in pieces {
                chart.draw_series(LineSeries::new(piece, style))?;
            }
            Ok::<_, DrawingAreaErrorKind<B::ErrorType>>(())
        };
        if !axes.smooth.is_empty() {
            curve(&axes.smooth, BLUE, &format!("training{}", last_value(&axes.smooth)))?;
        }
        let validation: Vec<(f64, f64)> = self.validation.iter().map(|&(step, value)| (step as f64, value)).collect();
        if !validation.is_empty() {
            curve(&validation, VERMILION, &format!("validation{}", last_value(&validation)))?;
        }
        let few = if validation.len() <= 60 { validation.as_slice() } else { &[] };
        let visible = few.iter().filter(|&&(_, value)| value <= top);
        chart.draw_series(visible.map(|&point| Circle::new(point, 5, VERMILION.filled())))?;
        for (index, (name, value)) in self.references.iter().enumerate() {
            let color = [GREEN, PURPLE, INK][index % 3];
            let line = [(axes.steps.start, *value), (axes.steps.end, *value)];
            chart.draw_series(DashedLineSeries::new(line, 12, 8, color.stroke_width(2)))?;
            let style = (FONT, 21).into_font().color(&color).pos(Pos::new(HPos::Right, VPos::Bottom));
            let text = format!("{name}  {value:.3}");
            let (x, y) = chart.backend_coord(&(axes.steps.end, *value));
            let (left, above) = area_origin(area);
            area.draw(&Text::new(text, (x - left - 10, y - above - 5), style))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::Coordinate(560, 14))
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font((FONT, 21).into_font().color(&INK))
            .legend_area_size(44)
            .margin(12)
            .draw()
    }

    fn paint_rate<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
        axes: &Axes,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let mut chart = ChartBuilder::on(area)
            .margin_top(10)
            .set_label_area_size(LabelAreaPosition::Left, 100)
            .set_label_area_size(LabelAreaPosition::Bottom, 64)
            .build_cartesian_2d(axes.steps.clone(), axes.rate.clone())?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(INK.mix(0.6))
            .label_style((FONT, 20).into_font().color(&INK))
            .axis_desc_style((FONT, 22).into_font().color(&INK))
            .x_labels(8)
            .y_labels(4)
            .x_label_formatter(&|step| thousands(*step as u64))
            .y_label_formatter(&|rate| if *rate == 0.0 { "0".to_owned() } else { format!("{rate:.0e}") })
            .x_desc("step")
            .y_desc("learning rate")
            .draw()?;
        let points = thin(&self.learning_rate);
        chart.draw_series(LineSeries::new(points, INK.stroke_width(3)))?;
        Ok(())
    }
}

/// The curves with the ranges of their axes.
struct Painting<'a> {
    plot: &'a LossPlot,
    axes: Axes,
}

impl Picture for Painting<'_> {
    fn paint<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        root.fill(&WHITE)?;
        let title = (FONT, 30, FontStyle::Bold).into_font().color(&INK);
        root.draw(&Text::new(self.plot.title.clone(), (36, 26), title))?;
        let (upper, lower) = root.margin(78, 22, 20, 36).split_vertically(650);
        self.plot.paint_loss(&upper, &self.axes)?;
        self.plot.paint_rate(&lower, &self.axes)
    }
}

struct Axes {
    steps: Range<f64>,
    loss: Range<f64>,
    rate: Range<f64>,
    smooth: Vec<(f64, f64)>,
}

/// Where an area lies in the picture.
fn area_origin<B: DrawingBackend>(area: &DrawingArea<B, Shift>) -> (i32, i32) {
    area.get_base_pixel()
}

/// The value at the end of a curve, for its name in the legend.
fn last_value(points: &[(f64, f64)]) -> String {
    points.last().map_or_else(String::new, |(_, value)| format!("  {value:.3}"))
}

fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default()).collect();
    groups.join(",")
}

/// Means of neighbours where there are more points than pixels.
fn thin(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(POINTS).max(1);
    let mean = |group: &[(u64, f64)]| {
        let count = group.len() as f64;
        let (x, y) = group.iter().fold((0.0, 0.0), |(x, y), &(step, value)| (x + step as f64, y + value));
        (x / count, y / count)
    };
    points.chunks(group).map(mean).collect()
}

/// A centred moving average over a fiftieth of the curve. It narrows at the beginning, where the loss falls fast; at
/// the end it looks back only, so that the last value is a mean too.
fn smooth(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let points = thin(points);
    let reach = points.len() / 100;
    let mut sums = vec![0.0];
    sums.extend(points.iter().scan(0.0, |sum, &(_, value)| {
        *sum += value;
        Some(*sum)
    }));
    let mean = |at: usize| {
        let reach = reach.min(at);
        let (from, to) = (at - reach, (at + reach + 1).min(points.len()));
        (sums[to] - sums[from]) / (to - from) as f64
    };
    points.iter().enumerate().map(|(at, &(step, _))| (step, mean(at))).collect()
}

/// The parts of a curve inside the axis, cut where it crosses the axis' ends.
fn clip(points: &[(f64, f64)], range: &Range<f64>) -> Vec<Vec<(f64, f64)>> {
    let mut pieces: Vec<Vec<(f64, f64)>> = vec![Vec::new()];
    let inside = |value: f64| (range.start..=range.end).contains(&value);
    for (index, &(x, y)) in points.iter().enumerate() {
        if index > 0 {
            let (before_x, before_y) = points[index - 1];
            if inside(before_y) != inside(y) {
                let outer = if inside(y) { before_y } else { y };
                let edge = if outer > range.end { range.end } else { range.start };
                let crossing = before_x + (x - before_x) * (edge - before_y) / (y - before_y);
                if let Some(piece) = pieces.last_mut() {
                    piece.push((crossing, edge));
                }
                if inside(before_y) {
                    pieces.push(Vec::new());
                }
            }
        }
        if inside(y)
            && let Some(piece) = pieces.last_mut()
        {
            piece.push((x, y));
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    fn run() -> LossPlot {
        let mut noise = 1u32;
        let metrics: Vec<Metrics> = (1..=2400u64)
            .flat_map(|step| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let jitter = f64::from(noise >> 16) / 65_536.0 - 0.5;
                let level = 1.72 + 6.3 / (1.0 + step as f64 / 18.0) - 0.00006 * step as f64;
                let rate = 3e-3 * (step as f64 / 100.0).min(1.0) * (1.0 - step.saturating_sub(1900) as f64 / 520.0);
                let bits_per_byte = Some(level + 0.25 * jitter);
                let train = Metrics { step, bits_per_byte, learning_rate: Some(rate), ..Metrics::default() };
                let evaluation = (step % 200 == 0).then(|| Metrics {
                    step,
                    validation_bits_per_byte: Some(level + 0.12),
                    ..Metrics::default()
                });
                [Some(train), evaluation].into_iter().flatten()
            })
            .collect();
        LossPlot::new("tiny: Moby-Dick and the State of the Union", &metrics)
            .reference("gzip -9", 2.918)
            .reference("xz -9", 2.088)
    }

    #[test]
    fn draws_both_files_with_text_on_a_machine_without_fonts() {
        let folder = TempDir::new().unwrap();
        let (png, svg) = (folder.path().join("loss.png"), folder.path().join("loss.svg"));
        run().write_png(&png).unwrap();
        run().write_svg(&svg).unwrap();
        let bytes = fs::read(&png).unwrap();
        assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
        // Width and height in the header, big-endian.
        assert_eq!(bytes[16..24], [1600u32.to_be_bytes(), 1000u32.to_be_bytes()].concat());
        let text = fs::read_to_string(&svg).unwrap();
        for word in ["xz -9  2.088", "gzip -9", "validation", "bits per byte", "learning rate", "Moby-Dick"] {
            assert!(text.contains(word), "{word}");
        }
        assert!(text.len() < 400_000, "{}", text.len());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn odd_curves_are_drawn_too() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("loss.png");
        let one = LossPlot { training: vec![(1, 2.0)], ..LossPlot::default() };
        one.write_png(&path).unwrap();
        let only_validation = LossPlot { validation: vec![(0, 2.0), (10, 2.0)], ..LossPlot::default() };
        only_validation.write_svg(&folder.path().join("loss.svg")).unwrap();
        let long = LossPlot { training: (0..50_000).map(|step| (step, 1.0)).collect(), ..LossPlot::default() };
        long.write_png(&path).unwrap();
        assert!(matches!(LossPlot::default().write_png(&path), Err(RecordError::NothingToDraw)));
        let missing = folder.path().join("no").join("loss.png");
        assert!(one.write_png(&missing).is_err() && one.write_svg(&missing).is_err());
    }

    #[test]
    fn losses_per_token_are_drawn_when_there_are_none_per_byte() {
        let metrics = [Metrics { step: 1, loss: Some(3.0), ..Metrics::default() }];
        let plot = LossPlot::new("", &metrics);
        assert_eq!((plot.unit.as_str(), plot.training), ("nats per token", vec![(1, 3.0)]));
    }

    #[test]
    fn curves_are_cut_at_the_edges() {
        let points = [(0.0, 8.0), (1.0, 4.0), (2.0, 3.0), (3.0, 5.0), (4.0, 3.0)];
        let pieces = clip(&points, &(1.0..4.0));
        assert_eq!(pieces, [vec![(1.0, 4.0), (1.0, 4.0), (2.0, 3.0), (2.5, 4.0)], vec![(3.5, 4.0), (4.0, 3.0)]]);
    }

    #[test]
    fn smoothing_keeps_level_and_number() {
        let points: Vec<(u64, f64)> = (0..1000).map(|step| (step, f64::from(step as u32 % 2))).collect();
        let smooth = smooth(&points);
        assert_eq!(smooth.len(), 1000);
        assert!(smooth[100..].iter().all(|&(_, value)| (value - 0.5).abs() < 0.06));
        assert_eq!(thousands(1_234_567), "1,234,567");
    }
}
