//! The plots of the document, as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::SegmentValue;
use plotters::prelude::*;
use std::path::Path;

const HEIGHT: u32 = 380;
const WIDTH: u32 = 860;
/// Room for the name of a bar.
const BAR_WIDTH: u32 = 104;
const COLOURS: [RGBColor; 3] =
    [RGBColor(31, 119, 180), RGBColor(214, 39, 40), RGBColor(44, 160, 44)];
const FONT: &str = "sans-serif";

/// One bar.
pub struct Bar {
    /// What is written below it.
    pub name: String,
    /// Its height.
    pub value: f64,
    /// The height it should have, a short line across it.
    pub target: Option<f64>,
    /// The height it cannot exceed, another such line.
    pub ceiling: Option<f64>,
}

/// A height that a line across a bar marks.
type Height = fn(&Bar) -> Option<f64>;
/// The lines, with their colours.
const LINES: [(Height, RGBColor); 2] =
    [(|bar| bar.target, COLOURS[1]), (|bar| bar.ceiling, COLOURS[2])];

/// A bar for each kind of work.
///
/// # Errors
///
/// If the file cannot be written.
pub fn bars(path: &Path, title: &str, unit: &str, bars: &[Bar]) -> Result<()> {
    let width = WIDTH.max(80 + BAR_WIDTH * bars.len() as u32);
    draw(path, width, |root| {
        let highest =
            bars.iter().flat_map(|bar| [Some(bar.value), bar.target, bar.ceiling]).flatten();
        let top = highest.fold(0.0, f64::max).max(1e-3) * 1.1;
        let names = (0..bars.len()).into_segmented();
        let mut chart = ChartBuilder::on(root)
            .caption(title, (FONT, 18))
            .margin(12)
            .x_label_area_size(32)
            .y_label_area_size(56)
            .build_cartesian_2d(names, 0.0..top)?;
        let name = |at: &SegmentValue<usize>| match at {
            SegmentValue::CenterOf(at) => {
                bars.get(*at).map_or_else(String::new, |bar| bar.name.clone())
            }
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(bars.len())
            .x_label_formatter(&name)
            .x_label_style((FONT, 12))
            .y_desc(unit)
            .y_label_style((FONT, 12))
            .draw()?;
        chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
            let corners =
                [(SegmentValue::Exact(at), bar.value), (SegmentValue::Exact(at + 1), 0.0)];
            let mut shape = Rectangle::new(corners, COLOURS[0].filled());
            shape.set_margin(0, 0, 12, 12);
            shape
        }))?;
        for (height, colour) in LINES {
            chart.draw_series(bars.iter().enumerate().filter_map(|(at, bar)| {
                let height = height(bar)?;
                let ends =
                    [(SegmentValue::Exact(at), height), (SegmentValue::Exact(at + 1), height)];
                Some(PathElement::new(ends, colour.stroke_width(2)))
            }))?;
        }
        chart.draw_series(bars.iter().enumerate().map(|(at, bar)| {
            let place = (SegmentValue::CenterOf(at), bar.value);
            let text = if bar.value < 0.1 {
                format!("{:.3}", bar.value)
            } else {
                format!("{:.2}", bar.value)
            };
            EmptyElement::at(place) + Text::new(text, (-11, -13), (FONT, 12))
        }))?;
        Ok(())
    })
}

/// For each series, which part of its values is at or below each time.
///
/// # Errors
///
/// If the file cannot be written.
pub fn distributions(path: &Path, title: &str, series: &[(String, Vec<f64>)]) -> Result<()> {
    draw(path, WIDTH, |root| {
        let longest = series.iter().flat_map(|(_, values)| values).copied().fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(root)
            .caption(title, (FONT, 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..longest * 1.05, 0.0..1.0)?;
        chart
            .configure_mesh()
            .x_desc("milliseconds")
            .y_desc("part of the kills")
            .label_style((FONT, 12))
            .draw()?;
        for (at, (name, values)) in series.iter().enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            let mut values = values.clone();
            values.sort_by(f64::total_cmp);
            let step = 1.0 / values.len().max(1) as f64;
            let points = values.iter().enumerate().flat_map(|(rank, value)| {
                let below = rank as f64 * step;
                [(*value, below), (*value, below + step)]
            });
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(name.clone())
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.filled())
            .border_style(BLACK)
            .label_font((FONT, 13))
            .draw()?;
        Ok(())
    })
}

type Drawn = Result<(), Box<dyn std::error::Error>>;
type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(path: &Path, width: u32, plot: impl FnOnce(&Root) -> Drawn) -> Result<()> {
    let drawn = || -> Drawn {
        let root = SVGBackend::new(path, (width, HEIGHT)).into_drawing_area();
        root.fill(&WHITE)?;
        plot(&root)?;
        root.present()?;
        Ok(())
    };
    // Errors of the drawing library cannot be sent between threads, as ours must be.
    drawn().map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}
