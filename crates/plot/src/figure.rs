//! Figures as data: rows of panels, each with a chart or a heat map.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Picture;
use crate::paint::{Canvas, Rectangle};
use crate::{BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION};

/// Colours in the order in which series take them.
pub const COLORS: [RGBColor; 7] = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK];

/// A whole picture.
#[derive(Clone, Debug, Default)]
pub struct Figure {
    /// Stands at the top, large.
    pub title: String,
    /// A line under it.
    pub subtitle: String,
    /// Rows of panels, from the top; a row's height by its weight.
    pub rows: Vec<(f64, Vec<Panel>)>,
}

/// A part of a picture.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Stands above it.
    pub title: String,
    /// Share of its row's width beside the others'.
    pub weight: f64,
    /// What it shows.
    pub body: Body,
}

/// What a panel shows.
#[derive(Clone, Debug)]
pub enum Body {
    /// Curves, points and bars over two axes.
    Chart(Chart),
    /// A matrix as colours.
    Heat(Heat),
}

/// Curves, points and bars over two axes.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    pub x: Axis,
    pub y: Axis,
    /// Drawn in this order.
    pub series: Vec<Series>,
    /// Where the names of the series stand, if they do.
    pub legend: Option<Legend>,
    /// Texts at points, in ink, begun there.
    pub notes: Vec<(f64, f64, String)>,
    /// Ranges of x that are shaded.
    pub bands: Vec<(f64, f64)>,
}

/// An axis.
#[derive(Clone, Debug, Default)]
pub struct Axis {
    /// What it shows, with its unit.
    pub label: String,
    /// Logarithmic: values up to zero are left out.
    pub log: bool,
    /// Its ends; from the data where not given.
    pub range: Option<(f64, f64)>,
    /// Its marks; round numbers where not given.
    pub ticks: Option<Vec<(f64, String)>>,
}

/// Points with a name.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend; without one it is not there.
    pub name: String,
    pub points: Vec<(f64, f64)>,
    pub color: RGBColor,
    pub mark: Mark,
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mark {
    Line,
    /// A thin, pale line, for what stands behind the rest.
    Faint,
    Dashed,
    Dotted,
    Dots,
    /// A line with dots at its points.
    LineDots,
    /// The pale inside of a closed curve, as of a band: along its upper edge and back along the lower one.
    Area,
    /// Lines from zero, of a share of the distance between points.
    Bars(f64),
}

/// A matrix as colours, row 0 on top.
#[derive(Clone, Debug, Default)]
pub struct Heat {
    /// Rows of equal length; `None` stays white.
    pub values: Vec<Vec<Option<f64>>>,
    pub palette: Palette,
    /// Values at the ends of the palette.
    pub range: (f64, f64),
    /// What the colours show.
    pub bar_label: String,
    pub x_label: String,
    pub y_label: String,
    /// Texts at columns and rows; a column's is left out where it would touch the one before.
    pub x_ticks: Vec<(usize, String)>,
    pub y_ticks: Vec<(usize, String)>,
    /// Cells are as wide as high.
    pub square: bool,
    /// Lines after every so many rows and columns, for blocks; 0 for none.
    pub blocks: (usize, usize),
}

/// The colours of a heat map. Both are told apart in print and with any colour vision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Palette {
    /// From white to dark blue.
    #[default]
    Sequential,
    /// Vermilion, white in the middle, blue.
    Diverging,
}

/// Where the names of a chart's series stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Legend {
    /// In lines between title and chart, where they cover nothing.
    Above,
    TopLeft,
    TopRight,
    BottomLeft,
    BottomRight,
}

impl Palette {
    /// The colour at a place from 0 to 1.
    pub fn color(self, at: f64) -> RGBColor {
        const BLUES: [(u8, u8, u8); 5] =
            [(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 40, 95)];
        const BOTH: [(u8, u8, u8); 5] = [(165, 60, 0), (240, 165, 105), (255, 255, 255), (110, 180, 225), (0, 75, 135)];
        let colors = if self == Palette::Sequential { BLUES } else { BOTH };
        let place = at.clamp(0.0, 1.0) * (colors.len() - 1) as f64;
        let low = (place as usize).min(colors.len() - 2);
        let (a, b, part) = (colors[low], colors[low + 1], place - low as f64);
        let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * part).round() as u8;
        RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
    }
}

impl Axis {
    /// A linear axis over the data.
    pub fn linear(label: impl Into<String>) -> Axis {
        Axis { label: label.into(), ..Axis::default() }
    }

    /// A logarithmic axis over the data.
    pub fn log(label: impl Into<String>) -> Axis {
        Axis { log: true, ..Axis::linear(label) }
    }

    /// With these ends.
    pub fn from(mut self, low: f64, high: f64) -> Axis {
        self.range = Some((low, high));
        self
    }

    /// With these marks.
    pub fn ticks(mut self, ticks: impl IntoIterator<Item = (f64, String)>) -> Axis {
        self.ticks = Some(ticks.into_iter().collect());
        self
    }
}

impl Series {
    /// A line in the colour of this number.
    pub fn line(name: impl Into<String>, color: usize, points: impl IntoIterator<Item = (f64, f64)>) -> Series {
        let points = points.into_iter().collect();
        Series { name: name.into(), points, color: COLORS[color % COLORS.len()], mark: Mark::Line }
    }

    /// Drawn in another way.
    pub fn mark(mut self, mark: Mark) -> Series {
        self.mark = mark;
        self
    }
}

impl Panel {
    /// A chart of weight 1.
    pub fn chart(title: impl Into<String>, chart: Chart) -> Panel {
        Panel { title: title.into(), weight: 1.0, body: Body::Chart(chart) }
    }

    /// A heat map of weight 1.
    pub fn heat(title: impl Into<String>, heat: Heat) -> Panel {
        Panel { title: title.into(), weight: 1.0, body: Body::Heat(heat) }
    }

    /// Wider or narrower than the others of its row.
    pub fn weight(mut self, weight: f64) -> Panel {
        self.weight = weight;
        self
    }
}

impl Picture for Figure {
    fn paint<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let canvas = Canvas::new(root)?;
        let mut top = canvas.heading(&self.title, &self.subtitle)?;
        let whole = canvas.whole();
        let (height, heights) = (whole.bottom - top, self.rows.iter().map(|r| r.0).sum::<f64>());
        for (share, panels) in &self.rows {
            let bottom = top + (f64::from(height) * share / heights) as i32;
            let (mut left, weights) = (whole.left, panels.iter().map(|p| p.weight).sum::<f64>());
            for panel in panels {
                let right = left + (f64::from(whole.right - whole.left) * panel.weight / weights) as i32;
                canvas.panel(panel, Rectangle { left, top, right, bottom })?;
                left = right;
            }
            top = bottom;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        let wave = |n: usize| (0..n).map(|i| (i as f64, (i as f64 / 5.0).sin()));
        let chart = Chart {
            x: Axis::linear("time in s"),
            y: Axis::linear("value"),
            series: vec![
                Series::line("waves", 0, wave(50)),
                Series::line("bars", 1, wave(5)).mark(Mark::Bars(0.8)),
                Series::line("dots", 2, wave(9)).mark(Mark::LineDots),
                Series::line("", 3, wave(9)).mark(Mark::Dashed),
                Series::line("", 4, [(0.0, 1.0), (9.0, 1.0), (9.0, 0.5), (0.0, 0.5)]).mark(Mark::Area),
            ],
            legend: Some(Legend::TopRight),
            notes: vec![(1.0, 0.0, "a note".into())],
            bands: vec![(2.0, 4.0)],
        };
        let log = Chart {
            x: Axis::log("steps"),
            y: Axis::log("error"),
            series: vec![Series::line("falls", 0, [(1.0, 1e-3), (10.0, 1e-9), (100.0, 0.0)])],
            legend: Some(Legend::Above),
            ..Chart::default()
        };
        let values = (0..8).map(|i| (0..8).map(|j| (j <= i).then_some(f64::from(i * j))).collect()).collect();
        let heat = Heat { values, range: (0.0, 49.0), bar_label: "product".into(), blocks: (4, 4), ..Heat::default() };
        let empty = Chart::default();
        Figure {
            title: "Everything".into(),
            subtitle: "in one picture".into(),
            rows: vec![
                (1.0, vec![Panel::chart("waves", chart), Panel::chart("log", log)]),
                (1.0, vec![Panel::heat("heat", heat), Panel::chart("nothing", empty)]),
            ],
        }
    }

    #[test]
    fn both_files_hold_everything() {
        let folder = tempfile::tempdir().unwrap();
        let (png, svg) = (folder.path().join("a.png"), folder.path().join("a.svg"));
        figure().write_png(&png).unwrap();
        figure().write_svg(&svg).unwrap();
        let text = std::fs::read_to_string(&svg).unwrap();
        for word in ["Everything", "in one picture", "time in s", "waves", "10⁻⁶", "a note", "product"] {
            assert!(text.contains(word), "{word}");
        }
        assert_eq!(std::fs::read(&png).unwrap()[..4], *b"\x89PNG");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(figure().write_svg(&folder.path().join("none/a.svg")).is_err());
    }

    #[test]
    fn palettes_end_where_they_should() {
        assert_eq!(Palette::Sequential.color(0.0), RGBColor(255, 255, 255));
        assert_eq!(Palette::Diverging.color(0.5), RGBColor(255, 255, 255));
        assert_eq!(Palette::Diverging.color(7.0), RGBColor(0, 75, 135));
    }
}
