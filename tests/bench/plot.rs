//! Draws two figures over the size of a segment: Redis time of an insert, and spans a second.
//!
//! Out:    an SVG that is readable on light and on dark ground: a middle grey for text, no ground of its own.
//! Keeps:  both axes are logarithmic; every line carries its name at its end.
//! Knows:  medians. Pure.

use std::fmt::Write as _;

use crate::{
    SIZES, WAYS,
    report::{Measured, grouped},
};

const PANEL: f64 = 420.0;
const HEIGHT: f64 = 330.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 84.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
const COLOURS: [&str; 3] = ["#888888", "#d9662b", "#2a8fd0"];

/// One value of a way at a size, if it was measured.
type Value<'m> = &'m dyn Fn(&str, usize) -> Option<f64>;

pub(crate) fn draw(store: &Measured) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#808080\">\n",
        2.0 * PANEL
    );
    panel(
        &mut svg,
        0.0,
        "Insert: Redis time a span, µs (less is better)",
        &|way, size| store.redis_us(way, size),
    );
    panel(
        &mut svg,
        PANEL,
        "Insert: spans a second (more is better)",
        &|way, size| store.spans_a_second(way, size),
    );
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, x: f64, title: &str, value: Value<'_>) {
    let values: Vec<f64> = WAYS
        .iter()
        .flat_map(|way| SIZES.iter().filter_map(|&size| value(way, size)))
        .collect();
    let (low, high) = values
        .iter()
        .fold((f64::MAX, f64::MIN), |(low, high), &value| {
            (low.min(value), high.max(value))
        });
    if low > high {
        return;
    }
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    let across = |size: usize| x + LEFT + (size as f64).log10() / 5.0 * (PANEL - LEFT - RIGHT);
    let up = |value: f64| {
        HEIGHT - BOTTOM - (value.log10() - low) / (high - low).max(1.0) * (HEIGHT - TOP - BOTTOM)
    };
    writeln!(
        svg,
        "<text x=\"{}\" y=\"20\" font-size=\"14\">{title}</text>",
        x + LEFT
    )
    .unwrap();
    let mut decade = low;
    while decade <= high {
        let y = up(10_f64.powf(decade));
        writeln!(
            svg,
            "<line x1=\"{}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#808080\" stroke-opacity=\"0.3\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            x + LEFT,
            x + PANEL - RIGHT,
            x + LEFT - 6.0,
            y + 4.0,
            label(10_f64.powf(decade))
        )
        .unwrap();
        decade += 1.0;
    }
    for size in SIZES {
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            across(size),
            HEIGHT - BOTTOM + 18.0,
            grouped(size)
        )
        .unwrap();
    }
    writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">spans a segment, child first</text>",
        x + LEFT + (PANEL - LEFT - RIGHT) / 2.0,
        HEIGHT - 14.0
    )
    .unwrap();
    let mut taken: Vec<f64> = Vec::new();
    for (way, colour) in WAYS.iter().zip(COLOURS) {
        let points: Vec<(f64, f64)> = SIZES
            .iter()
            .filter_map(|&size| Some((across(size), up(value(way, size)?))))
            .collect();
        let line: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>",
            line.join(" ")
        )
        .unwrap();
        for (x, y) in &points {
            writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"
            )
            .unwrap();
        }
        if let Some(&(x, mut y)) = points.last() {
            // Names keep off each other.
            while taken.iter().any(|other| (other - y).abs() < 14.0) {
                y += 7.0;
            }
            taken.push(y);
            writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\" font-weight=\"bold\">{way}</text>",
                x + 8.0,
                y + 4.0
            )
            .unwrap();
        }
    }
}

fn label(value: f64) -> String {
    if value >= 1_000_000.0 {
        format!("{:.0} M", value / 1_000_000.0)
    } else if value >= 1_000.0 {
        format!("{:.0} k", value / 1_000.0)
    } else {
        format!("{value}")
    }
}
