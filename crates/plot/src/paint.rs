//! How panels are painted, in pixels.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, FontTransform};

use crate::figure::{Axis, Body, Chart, Heat, Legend, Mark, Panel, Series};
use crate::{FONT, GRID, INK, ticks};

const MARGIN: i32 = 30;
const TITLE: u32 = 32;
const SUBTITLE: u32 = 21;
const PANEL_TITLE: u32 = 24;
const LABEL: u32 = 20;
const TICK: u32 = 18;
/// Pixels before a name in a legend, for how its series is drawn.
const KEY: i32 = 46;
/// Pixels by which a drawn curve may miss its points.
const TOLERANCE: f64 = 0.5;
/// Opacity of areas.
const AREA: f64 = 0.22;
/// Colours of a heat map: few enough that runs of one colour are common, many enough to look smooth.
const SHADES: f64 = 96.0;

type Done<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// Pixels from the top left corner.
#[derive(Clone, Copy, Debug)]
pub struct Rectangle {
    pub left: i32,
    pub top: i32,
    pub right: i32,
    pub bottom: i32,
}

/// A drawing area in pixels.
pub struct Canvas<'a, B: DrawingBackend> {
    root: &'a DrawingArea<B, Shift>,
}

/// From a value to a pixel.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    from: i32,
    to: i32,
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, from: i32, to: i32, margin: f64) -> Scale {
        let log = axis.log;
        let usable = values.filter(|v| v.is_finite() && !(log && *v <= 0.0));
        let (low, high) = axis
            .range
            .unwrap_or_else(|| usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v))));
        let (low, high) = if low <= high {
            (low, high)
        } else if log {
            (0.1, 1.0)
        } else {
            (0.0, 1.0)
        };
        let (mut low, mut high) = if log { (low.log10(), high.log10()) } else { (low, high) };
        if low == high {
            (low, high) = (low - 0.5, high + 0.5);
        } else if axis.range.is_none() {
            (low, high) = (low - margin * (high - low), high + margin * (high - low));
        }
        Scale { log, low, high, from, to }
    }

    /// `None` where there is no such place on the axis.
    fn at(&self, value: f64) -> Option<f64> {
        let value = if self.log && value <= 0.0 {
            return None;
        } else if self.log {
            value.log10()
        } else {
            value
        };
        let share = (value - self.low) / (self.high - self.low);
        share.is_finite().then(|| f64::from(self.from) + share * f64::from(self.to - self.from))
    }

    fn ticks(&self, axis: &Axis, pixels: i32) -> Vec<(i32, String)> {
        let most = (f64::from(self.to - self.from).abs() / f64::from(pixels)) as usize;
        let all = match &axis.ticks {
            Some(ticks) => ticks.clone(),
            None if self.log => ticks::logarithmic(10f64.powf(self.low), 10f64.powf(self.high), most),
            None => ticks::linear(self.low, self.high, most),
        };
        let (first, last) = (self.from.min(self.to), self.from.max(self.to));
        let placed = all.into_iter().filter_map(|(value, text)| Some((self.at(value)?.round() as i32, text)));
        placed.filter(|(at, _)| (first - 1..=last + 1).contains(at)).collect()
    }
}

impl<'a, B: DrawingBackend> Canvas<'a, B> {
    /// A white canvas.
    pub fn new(root: &'a DrawingArea<B, Shift>) -> Result<Self, DrawingAreaErrorKind<B::ErrorType>> {
        root.fill(&WHITE)?;
        Ok(Canvas { root })
    }

    pub fn whole(&self) -> Rectangle {
        let (width, height) = self.root.dim_in_pixel();
        Rectangle { left: MARGIN - 10, top: 0, right: width as i32 - MARGIN + 10, bottom: height as i32 - 12 }
    }

    /// Writes title and subtitle; returns where what follows begins.
    pub fn heading(&self, title: &str, subtitle: &str) -> Result<i32, DrawingAreaErrorKind<B::ErrorType>> {
        self.text(title, (MARGIN, 22), TITLE, INK, (HPos::Left, VPos::Top), true)?;
        self.text(subtitle, (MARGIN, 66), SUBTITLE, INK, (HPos::Left, VPos::Top), false)?;
        Ok(if subtitle.is_empty() { 74 } else { 106 })
    }

    fn text(
        &self,
        text: &str,
        at: (i32, i32),
        size: u32,
        color: RGBColor,
        anchor: (HPos, VPos),
        bold: bool,
    ) -> Done<B> {
        let style = if bold { FontStyle::Bold } else { FontStyle::Normal };
        let font = (FONT, size, style).into_font().color(&color).pos(Pos::new(anchor.0, anchor.1));
        self.root.draw(&Text::new(text.to_owned(), at, font))
    }

    fn vertical(&self, text: &str, at: (i32, i32)) -> Done<B> {
        let font = (FONT, LABEL).into_font().transform(FontTransform::Rotate270).color(&INK);
        self.root.draw(&Text::new(text.to_owned(), at, font.pos(Pos::new(HPos::Center, VPos::Top))))
    }

    fn width(&self, text: &str, size: u32) -> i32 {
        let style = (FONT, size).into_font().color(&INK);
        self.root.estimate_text_size(text, &style).map_or(0, |(width, _)| width as i32)
    }

    fn fill(&self, area: Rectangle, color: impl Into<ShapeStyle>) -> Done<B> {
        let corners = [(area.left, area.top), (area.right, area.bottom)];
        self.root.draw(&plotters::element::Rectangle::new(corners, color))
    }

    fn line(&self, points: &[(i32, i32)], color: RGBAColor, width: u32) -> Done<B> {
        self.root.draw(&PathElement::new(points.to_vec(), color.stroke_width(width)))
    }

    fn dashes(&self, points: &[(i32, i32)], color: RGBColor, (dash, gap): (f64, f64)) -> Done<B> {
        let mut walked = 0.0;
        for pair in points.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            let length = f64::from(b.0 - a.0).hypot(f64::from(b.1 - a.1));
            let at = |t: f64| {
                let mix = |a: i32, b: i32| (f64::from(a) + f64::from(b - a) * t / length).round() as i32;
                (mix(a.0, b.0), mix(a.1, b.1))
            };
            let mut from = 0.0;
            while from < length {
                let phase = walked % (dash + gap);
                let (drawn, rest) = if phase < dash { (true, dash - phase) } else { (false, dash + gap - phase) };
                let to = length.min(from + rest.max(0.01));
                if drawn {
                    self.line(&[at(from), at(to)], color.to_rgba(), 3)?;
                }
                walked += to - from;
                from = to;
            }
        }
        Ok(())
    }

    pub fn panel(&self, panel: &Panel, area: Rectangle) -> Done<B> {
        self.text(&panel.title, (area.left + 10, area.top + 12), PANEL_TITLE, INK, (HPos::Left, VPos::Top), true)?;
        let area = Rectangle { top: area.top + 52, bottom: area.bottom - 10, ..area };
        match &panel.body {
            Body::Chart(chart) => self.chart(chart, area),
            Body::Heat(heat) => self.heat(heat, area),
        }
    }

    fn chart(&self, chart: &Chart, area: Rectangle) -> Done<B> {
        let points = || chart.series.iter().flat_map(|s| &s.points);
        let legend = if chart.legend == Some(Legend::Above) { self.legend_above(&chart.series, area)? } else { 0 };
        let (top, bottom) = (area.top + legend, area.bottom - 62);
        let bars = chart.series.iter().any(|s| matches!(s.mark, Mark::Bars(_)));
        let zero = bars.then_some(0.0);
        let ys = Scale::new(&chart.y, points().map(|p| p.1).chain(zero), bottom, top, 0.05);
        let y_ticks = ys.ticks(&chart.y, 46);
        let widest = y_ticks.iter().map(|t| self.width(&t.1, TICK)).max().unwrap_or(0);
        let (left, right) = (area.left + 44 + widest + 8, area.right - 22);
        let x_margin = if bars {
            0.04
        } else if chart.x.log {
            0.03
        } else {
            0.0
        };
        let xs = Scale::new(&chart.x, points().map(|p| p.0), left, right, x_margin);
        let inside = Rectangle { left, top, right, bottom };

        for &(from, to) in &chart.bands {
            if let (Some(from), Some(to)) = (xs.at(from), xs.at(to)) {
                let clamp = |x: f64| (x as i32).clamp(left, right);
                self.fill(Rectangle { left: clamp(from), right: clamp(to), ..inside }, GRID.mix(0.6).filled())?;
            }
        }
        for (y, text) in y_ticks {
            self.line(&[(left, y), (right, y)], GRID.to_rgba(), 1)?;
            self.text(&text, (left - 9, y), TICK, INK, (HPos::Right, VPos::Center), false)?;
        }
        for (x, text) in xs.ticks(&chart.x, 72) {
            self.line(&[(x, top), (x, bottom)], GRID.to_rgba(), 1)?;
            self.text(&text, (x, bottom + 8), TICK, INK, (HPos::Center, VPos::Top), false)?;
        }
        self.line(&[(left, top), (left, bottom), (right, bottom)], INK.mix(0.6), 1)?;
        let middle = (left + right) / 2;
        self.text(&chart.x.label, (middle, bottom + 35), LABEL, INK, (HPos::Center, VPos::Top), false)?;
        self.vertical(&chart.y.label, (area.left + 8, (top + bottom) / 2))?;
        for series in &chart.series {
            self.series(series, &xs, &ys, inside)?;
        }
        for (x, y, text) in &chart.notes {
            if let (Some(x), Some(y)) = (xs.at(*x), ys.at(*y)) {
                self.text(text, (x as i32, y as i32), TICK, INK, (HPos::Left, VPos::Center), false)?;
            }
        }
        match chart.legend {
            None | Some(Legend::Above) => Ok(()),
            Some(corner) => self.legend(&chart.series, corner, inside),
        }
    }

    fn series(&self, series: &Series, xs: &Scale, ys: &Scale, inside: Rectangle) -> Done<B> {
        let places: Vec<Option<(f64, f64)>> =
            series.points.iter().map(|&(x, y)| Some((xs.at(x)?, ys.at(y)?))).collect();
        let color = series.color;
        if let Mark::Bars(share) = series.mark {
            let distance = places.windows(2).filter_map(|w| Some(w[1]?.0 - w[0]?.0)).fold(f64::INFINITY, f64::min);
            let half = (if distance.is_finite() { distance } else { 40.0 } * share / 2.0).max(0.5);
            let ground = ys.at(if ys.log { 10f64.powf(ys.low) } else { 0.0 }).unwrap_or_default();
            for (x, y) in places.into_iter().flatten() {
                let clamp = |v: f64| (v.round() as i32).clamp(inside.top, inside.bottom);
                let (top, bottom) = (clamp(y.min(ground)), clamp(y.max(ground)));
                let (left, right) = ((x - half).round() as i32, (x + half).round() as i32);
                self.fill(Rectangle { left, top, right, bottom }, color.filled())?;
            }
            return Ok(());
        }
        if series.mark == Mark::Area {
            let clamp = |v: f64, low: i32, high: i32| (v.round() as i32).clamp(low, high);
            let corner = |(x, y)| (clamp(x, inside.left, inside.right), clamp(y, inside.top, inside.bottom));
            let corners: Vec<(i32, i32)> = places.into_iter().flatten().map(corner).collect();
            return self.root.draw(&Polygon::new(corners, color.mix(AREA).filled()));
        }
        if series.mark != Mark::Dots {
            for piece in clip(&places, inside) {
                match series.mark {
                    Mark::Dashed => self.dashes(&piece, color, (12.0, 8.0))?,
                    Mark::Dotted => self.dashes(&piece, color, (3.0, 7.0))?,
                    Mark::Faint => self.line(&piece, color.mix(0.55), 2)?,
                    _ => self.line(&piece, color.to_rgba(), 3)?,
                }
            }
        }
        if matches!(series.mark, Mark::Dots | Mark::LineDots) {
            let size = if series.mark == Mark::Dots { 4 } else { 5 };
            let visible = |&(x, y): &(f64, f64)| {
                (f64::from(inside.left) - 1.0..=f64::from(inside.right) + 1.0).contains(&x)
                    && (f64::from(inside.top) - 1.0..=f64::from(inside.bottom) + 1.0).contains(&y)
            };
            for (x, y) in places.into_iter().flatten().filter(visible) {
                self.root.draw(&Circle::new((x.round() as i32, y.round() as i32), size, color.filled()))?;
            }
        }
        Ok(())
    }

    /// Lines of keys and names; returns their height.
    fn legend_above(&self, series: &[Series], area: Rectangle) -> Result<i32, DrawingAreaErrorKind<B::ErrorType>> {
        const LINE: i32 = 26;
        let (left, mut line) = (area.left + 10, 0);
        let mut at = left;
        for series in series.iter().filter(|s| !s.name.is_empty()) {
            let width = KEY + self.width(&series.name, TICK) + 22;
            if at > left && at + width > area.right {
                (at, line) = (left, line + 1);
            }
            self.key(series, (at, area.top + 4 + LINE * line))?;
            at += width;
        }
        Ok(LINE * (line + 1) + 4)
    }

    fn legend(&self, series: &[Series], corner: Legend, inside: Rectangle) -> Done<B> {
        const LINE: i32 = 27;
        let named: Vec<&Series> = series.iter().filter(|s| !s.name.is_empty()).collect();
        let Some(widest) = named.iter().map(|s| self.width(&s.name, TICK)).max() else { return Ok(()) };
        let (width, height) = (widest + KEY + 20, LINE * named.len() as i32 + 12);
        let left = match corner {
            Legend::TopLeft | Legend::BottomLeft => inside.left + 12,
            _ => inside.right - width - 8,
        };
        let top = match corner {
            Legend::BottomLeft | Legend::BottomRight => inside.bottom - height - 10,
            _ => inside.top + 8,
        };
        let frame = Rectangle { left, top, right: left + width, bottom: top + height };
        self.fill(frame, WHITE.mix(0.88).filled())?;
        self.fill(frame, GRID.stroke_width(1))?;
        for (row, series) in named.iter().enumerate() {
            self.key(series, (left + 10, top + 6 + LINE / 2 + LINE * row as i32))?;
        }
        Ok(())
    }

    /// How a series is drawn, and its name.
    fn key(&self, series: &Series, (left, y): (i32, i32)) -> Done<B> {
        let (ends, color, middle) = ([(left, y), (left + 36, y)], series.color, (left + 18, y));
        let patch = Rectangle { left: left + 4, top: y - 7, right: left + 32, bottom: y + 7 };
        match series.mark {
            Mark::Bars(_) => self.fill(patch, color.filled())?,
            Mark::Area => self.fill(patch, color.mix(AREA).filled())?,
            Mark::Dots => self.root.draw(&Circle::new(middle, 5, color.filled()))?,
            Mark::Dashed => self.dashes(&ends, color, (9.0, 5.0))?,
            Mark::Dotted => self.dashes(&ends, color, (3.0, 7.0))?,
            Mark::Faint => self.line(&ends, color.mix(0.55), 2)?,
            Mark::Line | Mark::LineDots => self.line(&ends, color.to_rgba(), 4)?,
        }
        if series.mark == Mark::LineDots {
            self.root.draw(&Circle::new(middle, 5, color.filled()))?;
        }
        self.text(&series.name, (left + KEY, y), TICK, INK, (HPos::Left, VPos::Center), false)
    }

    fn heat(&self, heat: &Heat, area: Rectangle) -> Done<B> {
        let (rows, cols) = (heat.values.len(), heat.values.first().map_or(0, Vec::len));
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        let label = |text: &str| if text.is_empty() { 0 } else { 28 };
        let widest = heat.y_ticks.iter().map(|t| self.width(&t.1, TICK)).max().unwrap_or(0);
        let mut left = area.left + 12 + label(&heat.y_label) + widest + 8;
        let mut right = area.right - 110;
        let mut bottom = area.bottom - label(&heat.x_label) - if heat.x_ticks.is_empty() { 6 } else { 32 };
        let mut top = area.top;
        if heat.square {
            let side = (f64::from(right - left) / cols as f64).min(f64::from(bottom - top) / rows as f64);
            let (spare_x, spare_y) =
                (right - left - (side * cols as f64) as i32, bottom - top - (side * rows as f64) as i32);
            (left, right) = (left + spare_x / 2, right - spare_x / 2);
            (top, bottom) = (top + spare_y / 4, bottom - spare_y * 3 / 4);
        }
        let x_at = |col: f64| left + (f64::from(right - left) * col / cols as f64).round() as i32;
        let y_at = |row: f64| top + (f64::from(bottom - top) * row / rows as f64).round() as i32;
        let (low, high) = heat.range;
        let shade = |value: f64| ((value - low) / (high - low) * SHADES).round().clamp(0.0, SHADES);
        for (i, row) in heat.values.iter().enumerate() {
            let shades: Vec<Option<f64>> = row.iter().map(|v| v.filter(|v| v.is_finite()).map(shade)).collect();
            let mut from = 0;
            while from < cols {
                let length = shades[from..].iter().take_while(|s| **s == shades[from]).count();
                if let Some(shade) = shades[from] {
                    let (left, right) = (x_at(from as f64), x_at((from + length) as f64));
                    let cell = Rectangle { left, top: y_at(i as f64), right, bottom: y_at((i + 1) as f64) };
                    self.fill(cell, heat.palette.color(shade / SHADES).filled())?;
                }
                from += length;
            }
        }
        if heat.blocks.0 > 0 {
            for y in (heat.blocks.0..rows).step_by(heat.blocks.0).map(|row| y_at(row as f64)) {
                self.line(&[(left, y), (right, y)], INK.mix(0.35), 1)?;
            }
        }
        if heat.blocks.1 > 0 {
            for x in (heat.blocks.1..cols).step_by(heat.blocks.1).map(|col| x_at(col as f64)) {
                self.line(&[(x, top), (x, bottom)], INK.mix(0.35), 1)?;
            }
        }
        self.fill(Rectangle { left, top, right, bottom }, INK.mix(0.6).stroke_width(1))?;
        let mut free = i32::MIN;
        for (col, text) in &heat.x_ticks {
            let (x, width) = (x_at(*col as f64 + 0.5), self.width(text, TICK));
            if x - width / 2 < free {
                continue;
            }
            free = x + width / 2 + 2;
            self.text(text, (x, bottom + 7), TICK, INK, (HPos::Center, VPos::Top), false)?;
        }
        for (row, text) in &heat.y_ticks {
            self.text(text, (left - 8, y_at(*row as f64 + 0.5)), TICK, INK, (HPos::Right, VPos::Center), false)?;
        }
        let below = bottom + if heat.x_ticks.is_empty() { 8 } else { 33 };
        self.text(&heat.x_label, ((left + right) / 2, below), LABEL, INK, (HPos::Center, VPos::Top), false)?;
        if !heat.y_label.is_empty() {
            self.vertical(&heat.y_label, (left - widest - 8 - 30, (top + bottom) / 2))?;
        }
        self.color_bar(heat, Rectangle { left: right + 14, top, right: right + 32, bottom })
    }

    fn color_bar(&self, heat: &Heat, area: Rectangle) -> Done<B> {
        const STEPS: i32 = 64;
        for step in 0..STEPS {
            let y = |step: i32| area.bottom - (area.bottom - area.top) * step / STEPS;
            let cell = Rectangle { top: y(step + 1), bottom: y(step), ..area };
            let at = (f64::from(step) + 0.5) / f64::from(STEPS);
            self.fill(cell, heat.palette.color(at).filled())?;
        }
        self.fill(area, INK.mix(0.6).stroke_width(1))?;
        let axis = Axis::linear("").from(heat.range.0, heat.range.1);
        let scale = Scale::new(&axis, std::iter::empty(), area.bottom, area.top, 0.0);
        let mut widest = 0;
        for (y, text) in scale.ticks(&axis, 60) {
            widest = widest.max(self.width(&text, TICK));
            self.text(&text, (area.right + 6, y), TICK, INK, (HPos::Left, VPos::Center), false)?;
        }
        if heat.bar_label.is_empty() {
            return Ok(());
        }
        self.vertical(&heat.bar_label, (area.right + widest + 12, (area.top + area.bottom) / 2))
    }
}

/// The parts of a curve inside an area, in whole pixels, cut where it crosses the edge; a missing point ends a part.
fn clip(points: &[Option<(f64, f64)>], area: Rectangle) -> Vec<Vec<(i32, i32)>> {
    let mut pieces: Vec<Vec<(f64, f64)>> = Vec::new();
    let mut open = false;
    for pair in points.windows(2) {
        let Some(((from, to), whole)) = pair[0].zip(pair[1]).and_then(|(a, b)| clip_segment(a, b, area)) else {
            open = false;
            continue;
        };
        match pieces.last_mut().filter(|_| open) {
            Some(piece) => piece.push(to),
            None => pieces.push(vec![from, to]),
        }
        open = whole;
    }
    let pixel = |(x, y): (f64, f64)| (x.round() as i32, y.round() as i32);
    pieces.iter().map(|piece| simplify(piece).into_iter().map(pixel).collect()).collect()
}

/// The points of a curve that are needed to draw it within [`TOLERANCE`] (Ramer 1972; Douglas & Peucker 1973). Many
/// points to a pixel, each rounded to whole ones, would look like stairs.
fn simplify(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut needed = vec![false; points.len()];
    let mut open = vec![(0, points.len() - 1)];
    while let Some((from, to)) = open.pop() {
        (needed[from], needed[to]) = (true, true);
        let (a, b) = (points[from], points[to]);
        let (dx, dy) = (b.0 - a.0, b.1 - a.1);
        let square = (dx * dx + dy * dy).max(f64::MIN_POSITIVE);
        let off = |p: (f64, f64)| {
            let along = (((p.0 - a.0) * dx + (p.1 - a.1) * dy) / square).clamp(0.0, 1.0);
            (p.0 - a.0 - along * dx).hypot(p.1 - a.1 - along * dy)
        };
        let inner = (from + 1..to).map(|i| (i, off(points[i])));
        if let Some((furthest, distance)) = inner.max_by(|x, y| x.1.total_cmp(&y.1))
            && distance > TOLERANCE
        {
            open.extend([(from, furthest), (furthest, to)]);
        }
    }
    points.iter().zip(needed).filter_map(|(p, needed)| needed.then_some(*p)).collect()
}

type Segment = ((f64, f64), (f64, f64));

/// The part of a segment inside an area (Liang and Barsky), and whether that reaches its end.
fn clip_segment(a: (f64, f64), b: (f64, f64), area: Rectangle) -> Option<(Segment, bool)> {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let (mut from, mut to) = (0.0f64, 1.0f64);
    for (step, room) in [
        (-dx, a.0 - f64::from(area.left)),
        (dx, f64::from(area.right) - a.0),
        (-dy, a.1 - f64::from(area.top)),
        (dy, f64::from(area.bottom) - a.1),
    ] {
        if step == 0.0 {
            if room < 0.0 {
                return None;
            }
        } else if step < 0.0 {
            from = from.max(room / step);
        } else {
            to = to.min(room / step);
        }
    }
    let at = |t: f64| (a.0 + t * dx, a.1 + t * dy);
    (from <= to).then(|| ((at(from), at(to)), to == 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_cut_at_the_edges() {
        let area = Rectangle { left: 0, top: 0, right: 10, bottom: 10 };
        let curve = [Some((0.0, 5.0)), Some((5.0, 15.0)), Some((10.0, 5.0)), None, Some((1.0, 1.0)), Some((2.0, 2.0))];
        let expected = [vec![(0, 5), (3, 10)], vec![(8, 10), (10, 5)], vec![(1, 1), (2, 2)]];
        assert_eq!(clip(&curve, area), expected);
    }

    #[test]
    fn curves_keep_the_points_that_matter() {
        let peak = [(0.0, 0.0), (1.0, 0.1), (2.0, -0.1), (3.0, 9.0), (4.0, 0.0), (5.0, 0.0)];
        assert_eq!(simplify(&peak), [peak[0], peak[2], peak[3], peak[4], peak[5]]);
        assert_eq!(simplify(&[(1.0, 1.0); 3]), [(1.0, 1.0); 2]);
    }
}
