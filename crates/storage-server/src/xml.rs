//! XML as the services write it: elements and text.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A text that grows.
#[derive(Debug)]
pub(crate) struct Xml(String);

impl Xml {
    pub(crate) fn new() -> Self {
        Self("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_owned())
    }

    /// An element with text.
    pub(crate) fn text(&mut self, name: &str, text: impl AsRef<str>) {
        let _ = write!(self.0, "<{name}>{}</{name}>", escaped(text.as_ref()));
    }

    /// Text by itself.
    pub(crate) fn raw(&mut self, text: &str) {
        self.0.push_str(&escaped(text));
    }

    /// An element with elements. What follows a blank in `tag` are attributes.
    pub(crate) fn element(&mut self, tag: &str, content: impl FnOnce(&mut Self)) {
        let _ = write!(self.0, "<{tag}>");
        content(self);
        let name = tag.split(' ').next().unwrap_or(tag);
        let _ = write!(self.0, "</{name}>");
    }

    pub(crate) fn finish(self) -> String {
        self.0
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// `2026-11-20T17:46:09.000Z`.
pub(crate) fn iso_date(time: SystemTime) -> String {
    let since_1970 = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since_1970.as_secs() / 86400, since_1970.as_secs() % 86400);
    let (year, month, day) = date_of_day(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let millis = since_1970.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// The time of `20261120T174609Z`.
pub(crate) fn parse_basic_date(text: &str) -> Option<SystemTime> {
    let number = |range| text.get(range).and_then(|digits: &str| digits.parse::<u64>().ok());
    let (year, month, day) = (number(0..4)?, number(4..6)?, number(6..8)?);
    let (hour, minute, second) = (number(9..11)?, number(11..13)?, number(13..15)?);
    let known = (1970..10_000).contains(&year) && (1..=12).contains(&month);
    let known = known && (1..=31).contains(&day) && hour < 24 && minute < 60 && second < 61;
    let days = || day_of_date(year, month, day);
    known.then(|| {
        UNIX_EPOCH + Duration::from_secs(days() * 86400 + hour * 3600 + minute * 60 + second)
    })
}

/// Year, month and day of a day since 1970, by years that begin in March, of which 400 have 146 097 days.
fn date_of_day(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468; // since March of the year 0
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

/// The inverse of [`date_of_day`].
fn day_of_date(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year) = (year / 400, year % 400);
    let day = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year * 365 + year / 4 - year / 100 + day - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_and_read_back() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_795_196_769, "2026-11-20T17:46:09.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(iso_date(time), date);
            let basic = format!("{}Z", date[..19].replace(['-', ':'], ""));
            assert_eq!(parse_basic_date(&basic), Some(time), "{basic}");
        }
        for day in 0..100_000 {
            let (year, month, date) = date_of_day(day);
            assert_eq!(day_of_date(year, month, date), day);
        }
        assert_eq!(parse_basic_date("20261320T174609Z"), None);
        assert_eq!(parse_basic_date("yesterday"), None);
    }

    #[test]
    fn text_is_escaped() {
        let mut xml = Xml::new();
        xml.element("a b=\"1\"", |xml| xml.text("c", "<&>\""));
        let expected = "<a b=\"1\"><c>&lt;&amp;&gt;&quot;</c></a>";
        assert_eq!(xml.finish().lines().nth(1), Some(expected));
    }
}
