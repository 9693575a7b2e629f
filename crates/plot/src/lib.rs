//! Pictures as SVG and PNG, on any machine: the fonts are inside the program, and building needs no system library.
//!
//! A [`Picture`] paints itself on whatever backend it is given. [`figure`] has the usual one: panels with charts and
//! heat maps, described by data.

pub mod figure;
mod paint;
mod ticks;

use std::fs;
use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

pub use figure::{Axis, Body, Chart, Figure, Heat, Legend, Mark, Palette, Panel, Series};

// Subsets of DejaVu Sans; see assets/README.md.
static REGULAR: &[u8] = include_bytes!("../assets/DejaVuSans-subset.ttf");
static BOLD: &[u8] = include_bytes!("../assets/DejaVuSans-Bold-subset.ttf");

/// The name under which the fonts are registered, and what an SVG asks its viewer for.
pub const FONT: &str = "sans-serif";

/// Width and height in pixels: 16 to 10, sharp enough for a slide.
pub const SIZE: (u32, u32) = (1600, 1000);

// The palette of Okabe and Ito, which people with any colour vision can tell apart.
pub const BLUE: RGBColor = RGBColor(0, 114, 178);
pub const VERMILION: RGBColor = RGBColor(213, 94, 0);
pub const GREEN: RGBColor = RGBColor(0, 158, 115);
pub const PURPLE: RGBColor = RGBColor(160, 80, 140);
pub const ORANGE: RGBColor = RGBColor(230, 159, 0);
pub const SKY: RGBColor = RGBColor(86, 180, 233);
pub const INK: RGBColor = RGBColor(45, 50, 55);
pub const GREY: RGBColor = RGBColor(140, 146, 152);
pub const GRID: RGBColor = RGBColor(228, 231, 234);

/// A picture cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be drawn or encoded.
    #[error("cannot draw {path}: {reason}")]
    Draw { path: PathBuf, reason: String },
    /// The operating system refused.
    #[error("cannot write {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

/// Something that paints itself.
pub trait Picture {
    /// Draws on an area of [`SIZE`] pixels.
    ///
    /// # Errors
    /// Those of the backend.
    fn paint<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<(), DrawingAreaErrorKind<B::ErrorType>>;

    /// Writes a PNG file; an old one is replaced when the new one is complete.
    ///
    /// # Errors
    /// [`Error::Draw`], [`Error::Io`].
    fn write_png(&self, path: &Path) -> Result<(), Error> {
        // The backend chooses the format by the ending of the name.
        let temporary = path.with_extension("tmp.png");
        let drawn = finish(self, &BitMapBackend::new(&temporary, SIZE).into_drawing_area(), path);
        replace(&temporary, path, drawn)
    }

    /// Writes an SVG file; an old one is replaced when the new one is complete.
    ///
    /// # Errors
    /// As [`Picture::write_png`].
    fn write_svg(&self, path: &Path) -> Result<(), Error> {
        let mut text = String::new();
        finish(self, &SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), path)?;
        let temporary = path.with_extension("tmp.svg");
        let written = fs::write(&temporary, text).map_err(|source| Error::Io { path: path.into(), source });
        replace(&temporary, path, written)
    }
}

fn finish<P: Picture + ?Sized, B: DrawingBackend>(
    picture: &P,
    root: &DrawingArea<B, Shift>,
    path: &Path,
) -> Result<(), Error> {
    let failed = |reason: String| Error::Draw { path: path.to_path_buf(), reason };
    for (style, font) in [(FontStyle::Normal, REGULAR), (FontStyle::Bold, BOLD)] {
        register_font(FONT, style, font).map_err(|_| failed("the font inside the program is damaged".into()))?;
    }
    picture.paint(root).and_then(|()| root.present()).map_err(|error| failed(error.to_string()))
}

/// Puts a complete temporary file in the place of the real one; else removes it.
fn replace(temporary: &Path, path: &Path, result: Result<(), Error>) -> Result<(), Error> {
    let result = result
        .and_then(|()| fs::rename(temporary, path).map_err(|source| Error::Io { path: path.to_path_buf(), source }));
    if result.is_err() {
        // It may not have been made.
        let _ = fs::remove_file(temporary);
    }
    result
}
