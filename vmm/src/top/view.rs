//! The screen of `daxvm top`.

use devices::text::Bytes;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Table};

use super::map::{Map, mark};
use super::{Snapshot, duration, file_name, nanoseconds, printable};
use crate::api::ShareWindow;

/// The most rows that the decisions take, with their title.
const DECISION_ROWS: u16 = 5;

/// What is on the screen.
pub(super) struct Screen {
    pub now: Snapshot,
    /// The one before, for rates.
    pub before: Option<Snapshot>,
    /// Which share with a window is shown.
    pub share: usize,
    pub has_colors: bool,
}

impl Screen {
    /// Draws it all.
    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let Some(share) = self.now.window.shares.get(self.share) else {
            let text = Text::from(vec![self.title(None), Line::from("no share has a DAX window"), keys(1)]);
            frame.render_widget(Paragraph::new(text), area);
            return;
        };
        let decisions = (share.decisions.len() as u16 + 1).min(DECISION_ROWS);
        let rows = [
            Constraint::Length(3),
            Constraint::Fill(2),
            Constraint::Fill(3),
            Constraint::Length(decisions),
            Constraint::Length(1),
        ];
        let [head, map, files, policy, foot] = Layout::vertical(rows).areas(area);
        frame.render_widget(Paragraph::new(self.head(share)), head);
        self.draw_map(frame, map, share);
        self.draw_files(frame, files, share);
        frame.render_widget(Paragraph::new(self.decisions(share)), policy);
        frame.render_widget(Paragraph::new(keys(self.now.window.shares.len())), foot);
    }

    fn title(&self, share: Option<&ShareWindow>) -> Line<'static> {
        let status = &self.now.status;
        let mut title = format!(
            "daxvm {}  {} for {}  {} vCPUs, {}",
            status.pid,
            status.state,
            duration(status.uptime_seconds),
            status.cpus,
            Bytes(status.memory)
        );
        if let Some(share) = share {
            let (tag, number, count) = (printable(&share.tag), self.share + 1, self.now.window.shares.len());
            title.push_str(&format!("  share {tag} ({number} of {count})"));
        }
        Line::styled(title, Style::new().add_modifier(Modifier::BOLD))
    }

    fn head(&self, share: &ShareWindow) -> Vec<Line<'static>> {
        let counters = &share.counters;
        let chunks = share.chunks.len().max(1);
        let thrashes = match share.thrash.level {
            0 => String::new(),
            level => format!(", thrashing ({level} of 5)"),
        };
        let window = format!(
            "window {}: {} of {} chunks mapped ({} %), {} at most{thrashes}",
            Bytes(counters.size),
            counters.mapped_chunks,
            share.chunks.len(),
            100 * counters.mapped_chunks / chunks as u64,
            counters.peak_mapped_chunks
        );
        let rate = |value: fn(&ShareWindow) -> u64| rate(self.per_second(share, value));
        let rates = format!(
            "setup {}/s ({})  remove {}/s ({})  churn {}/s  denied {}/s",
            rate(|share| share.counters.setup_mappings),
            nanoseconds(share.setup_latency.mean_ns()),
            rate(|share| share.counters.remove_mappings),
            nanoseconds(share.remove_latency.mean_ns()),
            rate(|share| share.churned_chunks),
            rate(|share| share.denied_mappings)
        );
        vec![self.title(Some(share)), Line::from(window), Line::from(rates)]
    }

    /// The seconds between the two snapshots; none without two.
    fn interval(&self) -> Option<f64> {
        let before = self.before.as_ref()?.window.uptime_seconds;
        Some(self.now.window.uptime_seconds - before).filter(|interval| *interval > 0.0)
    }

    /// The same share in the snapshot before.
    fn share_before(&self, share: &ShareWindow) -> Option<&ShareWindow> {
        self.before.as_ref()?.window.shares.iter().find(|before| before.tag == share.tag)
    }

    fn per_second(&self, share: &ShareWindow, value: impl Fn(&ShareWindow) -> u64) -> Option<f64> {
        let before = value(self.share_before(share)?);
        Some(value(share).saturating_sub(before) as f64 / self.interval()?)
    }

    fn draw_map(&self, frame: &mut Frame<'_>, area: Rect, share: &ShareWindow) {
        let width = usize::from(area.width);
        // One row goes to the title.
        let map = Map::new(&share.chunks, width * usize::from(area.height.saturating_sub(1)));
        let block = Block::new().borders(Borders::TOP).title(format!(" chunks: {} ", map.scale()));
        let rows = map.cells.chunks(width.max(1)).map(|row| {
            let cells = row.iter().map(|number| {
                let (letter, style) = mark(*number, self.has_colors);
                Span::styled(letter.to_string(), style)
            });
            Line::from(cells.collect::<Vec<_>>())
        });
        frame.render_widget(Paragraph::new(rows.collect::<Vec<_>>()).block(block), area);
    }

    fn draw_files(&self, frame: &mut Frame<'_>, area: Rect, share: &ShareWindow) {
        let shown = self.now.files.shares.iter().find(|files| files.tag == share.tag);
        let before = self.before.as_ref().and_then(|before| {
            before.files.shares.iter().find(|files| files.tag == share.tag).map(|files| &files.table)
        });
        let files = shown.map(|shown| shown.table.files.as_slice()).unwrap_or_default();
        let rows = files.iter().map(|file| {
            let setups_before = before
                .and_then(|table| table.files.iter().find(|before| before.number == file.number))
                .map(|before| before.setup_mappings);
            let setups = setups_before
                .zip(self.interval())
                .map(|(before, interval)| file.setup_mappings.saturating_sub(before) as f64 / interval);
            let (letter, style) = mark(file.number, self.has_colors);
            let number = |value: u64| Text::from(value.to_string()).right_aligned();
            Row::new([
                Text::from(Span::styled(letter.to_string(), style)),
                number(file.mapped_chunks),
                number(file.peak_mapped_chunks),
                number(file.setup_mappings),
                Text::from(rate(setups)).right_aligned(),
                number(file.churned_chunks),
                Text::from(file_name(file.path.as_deref())),
            ])
        });
        let widths = [1, 7, 7, 9, 8, 8].map(Constraint::Length).into_iter().chain([Constraint::Fill(1)]);
        let right = |title: &'static str| Text::from(title).right_aligned();
        let titles = Row::new([
            Text::from(""),
            right("chunks"),
            right("peak"),
            right("setups"),
            right("/s"),
            right("churned"),
            Text::from("file"),
        ]);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let block = Block::new().borders(Borders::TOP).title(" files ");
        frame.render_widget(Table::new(rows, widths).header(titles.style(bold)).block(block), area);
    }

    fn decisions(&self, share: &ShareWindow) -> Vec<Line<'static>> {
        let (granted, denied) = (share.dax_granted, share.dax_denied);
        let title = format!("policy: {granted} files became DAX for the guest, {denied} not DAX");
        let mut lines = vec![Line::styled(title, Style::new().add_modifier(Modifier::BOLD))];
        for made in &share.decisions {
            let same = |share: &ShareWindow| {
                let same = share.decisions.iter().find(|other| {
                    (&other.rule, &other.reason, other.dax) == (&made.rule, &made.reason, made.dax)
                });
                same.map_or(0, |same| same.count)
            };
            let outcome = if made.dax { "DAX" } else { "not DAX" };
            lines.push(Line::from(format!(
                "{:>9} {:>7}/s {outcome:<8}{} ({})",
                made.count,
                rate(self.per_second(share, same)),
                printable(&made.rule),
                made.reason
            )));
        }
        lines
    }
}

fn keys(shares: usize) -> Line<'static> {
    Line::from(if shares > 1 { "q quit   Tab next share" } else { "q quit" })
}

/// A rate; a dash as long as there is none.
fn rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".into(),
        Some(rate) if rate < 99.95 => format!("{rate:.1}"),
        Some(rate) => format!("{rate:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Buffer;
    use ratatui::style::Color;

    use super::super::testing::snapshot;
    use super::*;

    fn screen(has_colors: bool) -> Screen {
        let mut now = snapshot();
        now.window.uptime_seconds += 2.0;
        now.window.shares[0].counters.setup_mappings += 25;
        now.window.shares[0].decisions[1].count += 3;
        now.files.shares[0].table.files[0].setup_mappings += 9;
        Screen { now, before: Some(snapshot()), share: 0, has_colors }
    }

    fn drawn(screen: &Screen, width: u16, height: u16) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        terminal.backend().buffer().clone()
    }

    fn lines(buffer: &Buffer) -> Vec<String> {
        let width = usize::from(buffer.area.width);
        let symbols =
            buffer.content.chunks(width).map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>());
        symbols.map(|line| line.trim_end().to_owned()).collect()
    }

    #[test]
    fn all_of_it_fits_on_80_by_24() {
        let lines = lines(&drawn(&screen(false), 80, 24));
        let has = |line: &str| assert!(lines.iter().any(|shown| shown == line), "{line:?} not in {lines:#?}");
        has("daxvm 4711  running for 2m 05s  2 vCPUs, 512 MiB  share src (1 of 2)");
        has("window 64 MiB: 18 of 32 chunks mapped (56 %), 30 at most, thrashing (3 of 5)");
        has("setup 12.5/s (12.3 µs)  remove 0.0/s (0 ns)  churn 0.0/s  denied 0.0/s");
        has("aaaaaaaaaaaa..bbbbbb............");
        has("a      12      20        39      4.5        2 lib/libc.so");
        has("b       6      20        30      0.0        2 bad\\u{1b}[2Jname");
        has("policy: 0 files became DAX for the guest, 0 not DAX");
        has("       10     1.5/s not DAX default (all)");
        assert_eq!(lines[23], "q quit   Tab next share");
    }

    #[test]
    fn colours_mark_files_and_only_where_they_are_wanted() {
        let grounds = |has_colors| {
            let buffer = drawn(&screen(has_colors), 80, 24);
            let grounds: Vec<_> = buffer.content.iter().map(|cell| (cell.bg, cell.fg)).collect();
            grounds
        };
        assert!(grounds(false).iter().all(|ground| *ground == (Color::Reset, Color::Reset)));
        let blue = grounds(true).iter().filter(|ground| ground.0 == Color::Blue).count();
        assert_eq!(blue, 12 + 1, "12 chunks, and one in the table");
    }

    #[test]
    fn another_share_and_no_share() {
        let large = Screen { share: 1, ..screen(false) };
        let shown = lines(&drawn(&large, 80, 24));
        assert!(shown[0].ends_with("share big (2 of 2)"), "{shown:#?}");
        assert!(shown.iter().any(|line| line.contains("chunks of 2 MiB")), "{shown:#?}");
        let none = Screen { share: 7, before: None, ..screen(false) };
        assert_eq!(lines(&drawn(&none, 80, 24))[1], "no share has a DAX window");
    }

    #[test]
    fn any_size_can_be_drawn() {
        for (width, height) in [(1, 1), (3, 40), (200, 2), (40, 10), (300, 100)] {
            drawn(&screen(true), width, height);
        }
    }
}
