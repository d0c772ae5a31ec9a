//! The map of a window's chunks: one cell for one chunk, or for as many as it takes for all to fit.

use std::collections::HashMap;

use ratatui::style::{Color, Style};

/// What marks a file where there are no colours; files with the same letter are told apart by nothing but the table.
const LETTERS: &[u8; 52] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// What marks a file where there are colours: those that every terminal with colours has, but black, white and grey.
const COLORS: [Color; 12] = [
    Color::Blue,
    Color::Green,
    Color::Yellow,
    Color::Magenta,
    Color::Cyan,
    Color::Red,
    Color::LightBlue,
    Color::LightGreen,
    Color::LightYellow,
    Color::LightMagenta,
    Color::LightCyan,
    Color::LightRed,
];

/// A free chunk.
const FREE: char = '.';

/// The letter of a file, by its number; [`FREE`] for none.
pub(super) fn letter(number: u32) -> char {
    match number.checked_sub(1) {
        Some(index) => LETTERS[index as usize % LETTERS.len()].into(),
        None => FREE,
    }
}

/// How a file is shown: by its letter, and where there are colours on a ground of its own.
pub(super) fn mark(number: u32, has_colors: bool) -> (char, Style) {
    let style = match number.checked_sub(1) {
        Some(index) if has_colors => Style::new().fg(Color::Black).bg(COLORS[index as usize % COLORS.len()]),
        _ => Style::new(),
    };
    (letter(number), style)
}

/// A map: the file that each cell shows, 0 for none, and how many chunks a cell stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Map {
    pub cells: Vec<u32>,
    pub chunks_per_cell: usize,
}

impl Map {
    /// A map of `chunks` in at most `room` cells. A cell of several chunks shows the file that has most of them; it is
    /// free only if all of them are.
    pub(super) fn new(chunks: &[u32], room: usize) -> Map {
        let chunks_per_cell = chunks.len().div_ceil(room.max(1)).max(1);
        Map { cells: chunks.chunks(chunks_per_cell).map(most_common).collect(), chunks_per_cell }
    }

    /// What the map is, in words.
    pub(super) fn scale(&self) -> String {
        match self.chunks_per_cell {
            1 => "a cell is a chunk of 2 MiB".into(),
            many => format!("a cell is {many} chunks of 2 MiB"),
        }
    }
}

fn most_common(chunks: &[u32]) -> u32 {
    let mut counts = HashMap::new();
    for number in chunks.iter().filter(|number| **number != 0) {
        *counts.entry(*number).or_insert(0) += 1;
    }
    // Of two with as many the one that was there first, so that the map does not flicker.
    counts
        .into_iter()
        .max_by_key(|(number, count)| (*count, u32::MAX - number))
        .map_or(0, |(number, _)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_who_has_most_of_it() {
        let chunks = [1, 1, 2, 0, 0, 0, 3, 4, 0, 5];
        assert_eq!(Map::new(&chunks, 10), Map { cells: chunks.into(), chunks_per_cell: 1 });
        assert_eq!(Map::new(&chunks, 4), Map { cells: vec![1, 0, 3, 5], chunks_per_cell: 3 });
        assert_eq!(Map::new(&chunks, 0).cells, [1]);
        assert_eq!(Map::new(&[], 5), Map { cells: vec![], chunks_per_cell: 1 });
    }

    #[test]
    fn a_file_keeps_its_mark() {
        let letters: String = [0, 1, 2, 27, 53].into_iter().map(letter).collect();
        assert_eq!(letters, ".abAa");
        assert_eq!(mark(1, false), ('a', Style::new()));
        assert_eq!(mark(1, true).1.bg, Some(Color::Blue));
        assert_eq!(mark(13, true).1.bg, Some(Color::Blue));
        assert_eq!(mark(0, true), ('.', Style::new()));
    }
}
