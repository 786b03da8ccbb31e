//! `src/abi.rs` is generated from `bpf/abi.h` by this file, and differs from it in nothing.
//!
//! The header keeps to a small part of C (see its first comment), which is all that is read here: what is not understood is
//! an error, not a guess. To refresh: `TOWPATH_REFRESH=1 cargo test -p towpath-datapath --test abi`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets what it does not expect fails"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

#[derive(Debug, Default)]
struct Header {
    defines: Vec<(String, u64)>,
    enums: Vec<(String, Vec<(String, u64)>)>,
    structs: Vec<Struct>,
}

#[derive(Debug)]
struct Struct {
    name: String,
    align: Option<usize>,
    fields: Vec<Field>,
}

#[derive(Debug)]
struct Field {
    name: String,
    kind: String,
    array: Option<usize>,
}

fn without_comments(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("/*") {
        out.push_str(before);
        rest = after.split_once("*/").expect("a comment that does not end").1;
    }
    out.push_str(rest);
    out
}

fn number(text: &str) -> u64 {
    let text = text.trim();
    if let Some((left, right)) = text.split_once("<<") {
        return number(left) << number(right);
    }
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).expect(text),
        None => text.parse().expect(text),
    }
}

fn parse_field(line: &str) -> Field {
    let (kind, name) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a field: {line}"));
    let (name, array) = match name.split_once('[') {
        Some((name, count)) => (name, Some(number(count.trim_end_matches(']')) as usize)),
        None => (name, None),
    };
    Field { name: name.to_owned(), kind: kind.trim_start_matches("struct ").trim().to_owned(), array }
}

fn parse(text: &str) -> Header {
    let text = without_comments(text);
    let mut header = Header::default();
    for line in text.lines().filter_map(|line| line.strip_prefix("#define ")) {
        if let Some((name, value)) = line.split_once(' ') {
            header.defines.push((name.to_owned(), number(value)));
        }
    }
    let code: String = text.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line.trim(), " "]).collect();
    let mut rest = code.as_str();
    while let Some((head, after)) = rest.split_once('{') {
        let (body, tail) = after.split_once('}').expect("a brace that does not close");
        let (attribute, tail) = tail.split_once(';').expect("a declaration that does not end");
        rest = tail;
        match head.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["enum", name] => {
                let values = body.split(',').map(str::trim).filter(|v| !v.is_empty());
                let values = values.map(|v| v.split_once('=').expect("every enum value is explicit"));
                header
                    .enums
                    .push(((*name).to_owned(), values.map(|(n, v)| (n.trim().to_owned(), number(v))).collect()));
            }
            ["struct", name] => {
                let fields = body.split(';').map(str::trim).filter(|f| !f.is_empty()).map(parse_field).collect();
                let align = attribute.split_once("aligned(").map(|(_, n)| number(&n[..n.find(')').unwrap()]) as usize);
                header.structs.push(Struct { name: (*name).to_owned(), align, fields });
            }
            other => panic!("not understood: {other:?}"),
        }
    }
    header
}

/// `tp_ct_key` → `CtKey`.
fn rust_name(c: &str) -> String {
    c.trim_start_matches("tp_")
        .split('_')
        .map(|part| {
            let (first, rest) = part.split_at(1);
            first.to_uppercase() + rest
        })
        .collect()
}

fn rust_type(field: &Field) -> String {
    let base = match field.kind.as_str() {
        "__u8" => "u8".to_owned(),
        "__u16" => "u16".to_owned(),
        "__u32" => "u32".to_owned(),
        "__u64" => "u64".to_owned(),
        "__be16" => "Be16".to_owned(),
        other if other.starts_with("tp_") => rust_name(other),
        other => panic!("field {} has a type that the rules do not allow: {other}", field.name),
    };
    match field.array {
        Some(count) => format!("[{base}; {count}]"),
        None => base,
    }
}

const PROLOGUE: &str = r#"//! Layouts and numbers that kernel programs and user space share: generated from `bpf/abi.h`, which says what each means.
//!
//! Do not edit. After a change of the header: `TOWPATH_REFRESH=1 cargo test -p towpath-datapath --test abi`.
#![allow(missing_docs, reason = "bpf/abi.h documents every field; this file is generated")]

/// A type that is its bytes: any bytes are a value of it, and all of its bytes are defined.
///
/// # Safety
/// Only for `repr(C)` or `repr(transparent)` types without padding whose fields are all plain.
pub unsafe trait Plain: Copy + Default + 'static {}

/// A 16-bit number in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Be16(u16);

impl Be16 {
    /// From a number of this machine.
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    /// As a number of this machine.
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
"#;

fn generate(header: &Header) -> String {
    let mut out = PROLOGUE.to_owned();
    out.push('\n');
    for (name, value) in &header.defines {
        writeln!(out, "pub const {name}: u32 = {value};").unwrap();
    }
    for (name, values) in &header.enums {
        writeln!(out, "\n// enum {name}").unwrap();
        for (name, value) in values {
            let text = if *value > 0xffff { format!("0x{value:x}") } else { value.to_string() };
            writeln!(out, "pub const {name}: u32 = {text};").unwrap();
        }
    }
    for s in &header.structs {
        let name = rust_name(&s.name);
        let align = s.align.map(|n| format!(", align({n})")).unwrap_or_default();
        writeln!(out, "\n#[repr(C{align})]").unwrap();
        writeln!(out, "#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]\npub struct {name} {{").unwrap();
        for field in &s.fields {
            writeln!(out, "    pub {}: {},", field.name, rust_type(field)).unwrap();
        }
        writeln!(out, "}}\n").unwrap();
        let sizes: Vec<String> = s.fields.iter().map(|f| format!("size_of::<{}>()", rust_type(f))).collect();
        writeln!(
            out,
            "const _: () = assert!(\n    size_of::<{name}>()\n        == {}\n);",
            sizes.join("\n            + ")
        )
        .unwrap();
        writeln!(out, "// SAFETY: repr(C), the line above shows that there is no padding, all fields are plain.")
            .unwrap();
        writeln!(out, "unsafe impl Plain for {name} {{}}").unwrap();
    }
    writeln!(out, "\n/// Name, size in bytes, and fields with their offsets in bytes.").unwrap();
    writeln!(out, "pub type Layout = (&'static str, usize, &'static [(&'static str, usize)]);").unwrap();
    writeln!(out, "\n/// Every struct: what the tests compare with the object's BTF.").unwrap();
    writeln!(out, "pub const LAYOUTS: &[Layout] = &[").unwrap();
    for s in &header.structs {
        let name = rust_name(&s.name);
        writeln!(out, "    (\n        \"{}\",\n        size_of::<{name}>(),\n        &[", s.name).unwrap();
        for field in &s.fields {
            writeln!(out, "            (\"{0}\", std::mem::offset_of!({name}, {0})),", field.name).unwrap();
        }
        writeln!(out, "        ],\n    ),").unwrap();
    }
    writeln!(out, "];").unwrap();
    out
}

fn rustfmt(source: &str) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("rustfmt is needed to compare src/abi.rs");
    child.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "rustfmt refused what was generated");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_rust_side_is_generated_from_the_header() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = parse(&std::fs::read_to_string(root.join("../../bpf/abi.h")).unwrap());
    let wanted = rustfmt(&generate(&header));
    let path = root.join("src/abi.rs");
    if std::env::var_os("TOWPATH_REFRESH").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "src/abi.rs differs from bpf/abi.h: refresh it with TOWPATH_REFRESH=1 cargo test -p towpath-datapath --test abi"
    );
}

#[test]
fn drop_reasons_and_others_have_a_value_once() {
    let header =
        parse(&std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bpf/abi.h")).unwrap());
    let reasons = &header.enums.iter().find(|(name, _)| name == "tp_reason").unwrap().1;
    let mut seen = BTreeMap::new();
    for (name, value) in reasons.iter().filter(|(name, _)| name != "TP_DROP_FIRST") {
        if let Some(other) = seen.insert(value, name) {
            panic!("{name} and {other} are both {value}");
        }
    }
}
