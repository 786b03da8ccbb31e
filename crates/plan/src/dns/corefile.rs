//! The syntax of a Corefile (CoreDNS's configuration, which is Caddy's): server blocks with directives, any of which may have a block
//! of its own. What the words mean is for [`super::rules`].

/// One line of words, and the block that it opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directive {
    /// The line it is in, from 1.
    pub line: usize,
    /// Its words, quotes taken off.
    pub words: Vec<String>,
    /// What is in its braces; none: it has none.
    pub block: Option<Vec<Directive>>,
}

/// What a file says, and what is wrong with it, each with its line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corefile {
    /// What is outside of all braces: server blocks.
    pub top: Vec<Directive>,
    /// For people.
    pub problems: Vec<String>,
}

/// Blocks within blocks beyond this depth are no Corefile.
const DEPTH: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Open,
    Close,
    EndOfLine,
}

/// Reads a file. Never fails: what cannot be understood is among the problems, and the rest is there.
pub fn parse(text: &str) -> Corefile {
    let mut reader = Reader::default();
    for (number, line) in text.lines().enumerate() {
        reader.line = number + 1;
        for token in tokens(line) {
            reader.take(token);
        }
    }
    reader.end()
}

/// The tokens of a line; the last is its end. A `#` begins a comment at the start of a word only.
fn tokens(line: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        if first == '#' {
            break;
        }
        let (word, after) = if first == '"' { quoted(rest) } else { plain(rest) };
        found.push(match word.as_str() {
            "{" if first != '"' => Token::Open,
            "}" if first != '"' => Token::Close,
            _ => Token::Word(word),
        });
        rest = after.trim_start();
    }
    found.push(Token::EndOfLine);
    found
}

fn plain(text: &str) -> (String, &str) {
    let (word, after) = text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()));
    (word.to_owned(), after)
}

/// A quoted word and what follows it. Within, `\"` is a quote.
fn quoted(text: &str) -> (String, &str) {
    let (mut word, mut escaped) = (String::new(), false);
    for (at, letter) in text.char_indices().skip(1) {
        match letter {
            '"' if !escaped => return (word, text.get(at + 1..).unwrap_or_default()),
            '"' => {
                word.pop();
                word.push('"');
            }
            other => word.push(other),
        }
        escaped = letter == '\\' && !escaped;
    }
    (word, "")
}

#[derive(Default)]
struct Reader {
    line: usize,
    /// What is being read; none: the next word begins a directive.
    words: Option<(usize, Vec<String>)>,
    /// Directives whose blocks are open, each with what is in its block so far.
    open: Vec<(Directive, Vec<Directive>)>,
    file: Corefile,
}

impl Reader {
    fn take(&mut self, token: Token) {
        match token {
            Token::Word(word) => self.words.get_or_insert_with(|| (self.line, Vec::new())).1.push(word),
            Token::Open if self.open.len() >= DEPTH => self.problem("more than eight blocks within each other"),
            Token::Open => {
                let (line, words) = self.words.take().unwrap_or((self.line, Vec::new()));
                self.open.push((Directive { line, words, block: None }, Vec::new()));
            }
            Token::Close => {
                self.finish();
                match self.open.pop() {
                    Some((directive, block)) => self.put(Directive { block: Some(block), ..directive }),
                    None => self.problem("a closing brace too many"),
                }
            }
            // Names of zones may go on in the next line after a comma.
            Token::EndOfLine => {
                let goes_on = self.words.as_ref().and_then(|(_, words)| words.last()).is_some_and(|w| w.ends_with(','));
                if !(goes_on && self.open.is_empty()) {
                    self.finish();
                }
            }
        }
    }

    fn finish(&mut self) {
        if let Some((line, words)) = self.words.take() {
            self.put(Directive { line, words, block: None });
        }
    }

    fn put(&mut self, directive: Directive) {
        match self.open.last_mut() {
            Some((_, block)) => block.push(directive),
            None => self.file.top.push(directive),
        }
    }

    fn problem(&mut self, what: &str) {
        self.file.problems.push(format!("line {}: {what}", self.line));
    }

    fn end(mut self) -> Corefile {
        self.finish();
        while let Some((directive, block)) = self.open.pop() {
            self.file.problems.push(format!("line {}: its brace is never closed", directive.line));
            self.put(Directive { block: Some(block), ..directive });
        }
        self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(directive: &Directive) -> String {
        directive.words.join("|")
    }

    #[test]
    fn blocks_comments_quotes_and_lists_of_zones_are_read_as_coredns_does() {
        let text = "# first\n.:53 {\n  errors # said\n  hosts {\n    10.0.0.1 a.test b#c\n    fallthrough\n  }\n  log \"a \\\"b\\\" {\"\n}\n\
                    x.test,\ny.test {\n forward . 1.1.1.1\n}\n(snippet) {\n}\n";
        let file = parse(text);
        assert_eq!(file.problems, Vec::<String>::new());
        let top: Vec<(usize, String)> = file.top.iter().map(|d| (d.line, words(d))).collect();
        assert_eq!(top, [(2, ".:53".to_owned()), (10, "x.test,|y.test".to_owned()), (14, "(snippet)".to_owned())]);
        let root = file.top[0].block.as_ref().unwrap();
        assert_eq!(root.iter().map(words).collect::<Vec<_>>(), ["errors", "hosts", "log|a \"b\" {"]);
        let hosts = root[1].block.as_ref().unwrap();
        assert_eq!(hosts.iter().map(words).collect::<Vec<_>>(), ["10.0.0.1|a.test|b#c", "fallthrough"]);
        assert_eq!(file.top[2].block, Some(Vec::new()));
    }

    #[test]
    fn braces_that_do_not_match_are_said_and_the_rest_is_read() {
        let file = parse("}\na {\n b {\n c\n");
        assert_eq!(
            file.problems,
            [
                "line 1: a closing brace too many",
                "line 3: its brace is never closed",
                "line 2: its brace is never closed"
            ]
        );
        assert_eq!(words(&file.top[0].block.as_ref().unwrap()[0]), "b");
        assert!(!parse(&"a {\n".repeat(100)).problems.is_empty());
    }

    fn show(directives: &[Directive], depth: usize, text: &mut String) {
        for directive in directives {
            text.push_str(&" ".repeat(depth));
            text.push_str(&directive.words.join(" "));
            if let Some(block) = &directive.block {
                text.push_str(" {\n");
                show(block, depth + 1, text);
                text.push('}');
            }
            text.push('\n');
        }
    }

    fn directives() -> impl Strategy<Value = Vec<Directive>> {
        let leaf =
            prop::collection::vec("[a-z0-9.:/]{1,8}", 1..4).prop_map(|words| Directive { line: 0, words, block: None });
        let tree = leaf.prop_recursive(3, 20, 4, |inner| {
            (prop::collection::vec("[a-z0-9.:/]{1,8}", 1..3), prop::collection::vec(inner, 0..4))
                .prop_map(|(words, block)| Directive { line: 0, words, block: Some(block) })
        });
        prop::collection::vec(tree, 0..4)
    }

    fn without_lines(directives: Vec<Directive>) -> Vec<Directive> {
        let strip = |d: Directive| Directive { line: 0, block: d.block.map(without_lines), ..d };
        directives.into_iter().map(strip).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(written in directives()) {
            let mut text = String::new();
            show(&written, 0, &mut text);
            let file = parse(&text);
            prop_assert!(file.problems.is_empty());
            prop_assert_eq!(without_lines(file.top), written);
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in "[ a-z.:#\"\\\\{}\n]{0,200}|\\PC{0,100}") {
            parse(&text);
        }
    }
}
