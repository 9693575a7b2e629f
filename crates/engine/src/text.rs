//! Text out of a stream of token ids: complete UTF-8 only, and nothing beyond a stop text.

use hognose_model::tokenizer::{StreamDecoder, Tokenizer};

/// Turns ids into text piece by piece and watches for stop texts.
pub struct TextStream<'a> {
    decoder: StreamDecoder<'a>,
    stops: Vec<String>,
    /// Decoded but not handed out: it may be the beginning of a stop text.
    held: String,
    text: String,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// Empty stop texts are ignored.
    pub fn new(tokenizer: &'a Tokenizer, stops: &[String]) -> TextStream<'a> {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        TextStream { decoder: tokenizer.decoder(), stops, held: String::new(), text: String::new(), stopped: false }
    }

    /// Takes the next id and returns the text that is certain now. After a stop text nothing more comes.
    pub fn push(&mut self, id: u32) -> Result<String, hognose_model::Error> {
        if self.stopped {
            return Ok(String::new());
        }
        let piece = self.decoder.push(id)?;
        Ok(self.take(&piece))
    }

    /// Whether a stop text was found. It is not part of the text.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// All text handed out so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Hands out what was held back.
    pub fn finish(&mut self) -> Result<String, hognose_model::Error> {
        if self.stopped {
            return Ok(String::new());
        }
        let rest = self.decoder.finish()?;
        let mut out = self.take(&rest);
        if !self.stopped {
            out.push_str(&self.held);
            self.text.push_str(&std::mem::take(&mut self.held));
        }
        Ok(out)
    }

    fn take(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        if let Some(end) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(end);
        }
        let keep = if self.stopped { 0 } else { self.possible_stop() };
        let rest = self.held.split_off(self.held.len() - keep);
        let out = std::mem::replace(&mut self.held, rest);
        self.text.push_str(&out);
        out
    }

    /// Bytes at the end that are the beginning of a stop text.
    fn possible_stop(&self) -> usize {
        let longest = |stop: &String| {
            let ends = stop.char_indices().map(|(i, _)| i).filter(|&i| i > 0);
            ends.filter(|&i| self.held.ends_with(&stop[..i])).max().unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, stops: &[&str]) -> (Vec<String>, String, bool) {
        let tokenizer = Tokenizer::Bytes;
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut stream = TextStream::new(&tokenizer, &stops);
        let mut pieces: Vec<String> =
            text.bytes().map(|b| stream.push(u32::from(b)).unwrap()).filter(|p| !p.is_empty()).collect();
        let last = stream.finish().unwrap();
        if !last.is_empty() {
            pieces.push(last);
        }
        (pieces, stream.text().to_string(), stream.stopped())
    }

    #[test]
    fn multi_byte_characters_come_whole() {
        let (pieces, text, stopped) = run("aé漢🐍", &[]);
        assert_eq!(pieces, ["a", "é", "漢", "🐍"]);
        assert_eq!((text.as_str(), stopped), ("aé漢🐍", false));
    }

    #[test]
    fn a_stop_text_across_tokens_is_never_shown() {
        let (_, text, stopped) = run("one two END three", &["END"]);
        assert_eq!((text.as_str(), stopped), ("one two ", true));
        let (_, text, stopped) = run("an EN that is none", &["END"]);
        assert_eq!((text.as_str(), stopped), ("an EN that is none", false));
        let (_, text, _) = run("xaab", &["aab", "ab"]);
        assert_eq!(text, "x");
    }

    #[test]
    fn what_looked_like_a_stop_text_at_the_end_is_shown() {
        let (_, text, stopped) = run("the EN", &["END"]);
        assert_eq!((text.as_str(), stopped), ("the EN", false));
    }
}
