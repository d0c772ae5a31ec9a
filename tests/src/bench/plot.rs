//! Results as a picture: a panel for each row of a table, a bar for each subject.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::Row;

const COLUMNS: usize = 2;
/// In pixels.
const WIDTH: u32 = 960;
const TITLE_HEIGHT: u32 = 30;
const PANEL_HEIGHT: u32 = 295;

/// Draws rows that stand together in the table in one panel each.
///
/// # Errors
/// The file cannot be written.
pub fn bars(file: &Path, title: &str, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let groups: Vec<&[Row]> = rows.chunk_by(|a, b| a.row == b.row).collect();
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let lines = groups.len().div_ceil(COLUMNS);
    let size = (WIDTH, TITLE_HEIGHT + lines as u32 * PANEL_HEIGHT);
    let root = SVGBackend::new(file, size).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 20))?;
    let panels = root.split_evenly((lines, COLUMNS));
    for (panel, group) in panels.iter().zip(groups) {
        let highest = group.iter().map(|row| row.median).fold(0.0, f64::max).max(1.0);
        let caption = [group[0].row.as_str(), group[0].unit].join(" ");
        let mut chart = ChartBuilder::on(panel)
            .caption(caption.trim_end(), ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(28)
            .y_label_area_size(64)
            .build_cartesian_2d((0..group.len()).into_segmented(), 0.0..highest * 1.15)?;
        let name = |at: &SegmentValue<usize>| match at {
            SegmentValue::CenterOf(index) => group.get(*index).map_or("", |row| &row.subject).to_owned(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .max_light_lines(1)
            .x_labels(group.len())
            .x_label_formatter(&name)
            .draw()?;
        chart.draw_series(group.iter().enumerate().map(|(index, row)| {
            let (left, right) = (SegmentValue::Exact(index), SegmentValue::Exact(index + 1));
            let mut bar = Rectangle::new([(left, 0.0), (right, row.median)], BLUE.mix(0.6).filled());
            bar.set_margin(0, 0, 14, 14);
            bar
        }))?;
        chart.draw_series(group.iter().enumerate().map(|(index, row)| {
            let at = (SegmentValue::CenterOf(index), row.median + highest * 0.06);
            let text = format!("{:.*}", usize::from(row.median < 100.0), row.median);
            Text::new(text, at, ("sans-serif", 13))
        }))?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_and_name_is_in_the_picture() -> Result<(), Box<dyn Error>> {
        let mut table = super::super::Table::default();
        table.add("time", "never", "s", vec![12.3]);
        table.add("time", "always", "s", vec![45.6]);
        table.add("mappings", "never", "", vec![0.0]);
        table.add("mappings", "always", "", vec![20_008.0]);
        let file = tempfile::NamedTempFile::new()?;
        bars(file.path(), "a title", table.rows())?;
        let picture = std::fs::read_to_string(file.path())?;
        for text in ["a title", "time s", "mappings", "never", "always", "12.3", "45.6", "20008"] {
            assert!(picture.contains(text), "{text} is not in the picture");
        }
        Ok(())
    }
}
