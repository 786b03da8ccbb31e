//! Layouts of map keys and values as BTF describes them, and entries carried from one layout to another.
//!
//! Fields are what they are called: a field of the same name holds the same in every version of the programs, so one whose meaning
//! changes gets another name, and zero in a value means what it meant when the field was not there (see `bpf/abi.h`). On that, two versions
//! that know nothing of each other share a map whose layout is the same, and copy entries where it is not, forwards and back.
//!
//! BTF is parsed here and not by libbpf because both sides, a map in the kernel and the built-in object, must be read alike;
//! the format is the kernel's `Documentation/bpf/btf.rst`.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
/// Types within types: ours have four.
const DEPTH_MAX: u32 = 16;
/// Fields of one layout, arrays of structs taken apart: ours have a thousand.
const FIELDS_MAX: usize = 1 << 16;

mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// A field that is no struct: where it is and what it is called from the outermost struct on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    path: String,
    offset: usize,
    /// Bytes of one element.
    element: usize,
    /// Elements: 1 of what is no array.
    count: usize,
}

impl Field {
    fn bytes<'v>(&self, value: &'v [u8]) -> Option<&'v [u8]> {
        value.get(self.offset..self.offset + self.element * self.count)
    }

    /// Holds nothing.
    fn is_padding(&self) -> bool {
        self.path.rsplit('.').next().is_some_and(|name| name.starts_with("pad"))
    }
}

/// The layout of a key or a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    size: usize,
    fields: Vec<Field>,
}

/// One version's entries of a map into another's.
#[derive(Debug)]
pub(super) struct Conversion {
    key: Moves,
    value: Moves,
}

/// How bytes get from one layout into another.
#[derive(Debug)]
struct Moves {
    size: usize,
    moves: Vec<(Field, Field)>,
}

impl Layout {
    /// From one layout into another: fields of the same name. None if a field of `to` has no predecessor and `required`.
    fn moves(&self, to: &Self, required: bool) -> Option<Moves> {
        let known: HashMap<&str, &Field> = self.fields.iter().map(|field| (field.path.as_str(), field)).collect();
        let mut moves = Vec::new();
        for field in to.fields.iter().filter(|field| !field.is_padding()) {
            match known.get(field.path.as_str()) {
                Some(from) => moves.push(((*from).clone(), field.clone())),
                None if required => return None,
                None => {}
            }
        }
        // A key that loses a field would make two entries one.
        let kept = |from: &Field| from.is_padding() || moves.iter().any(|(other, _)| other.path == from.path);
        if required && !self.fields.iter().all(kept) {
            return None;
        }
        Some(Moves { size: to.size, moves })
    }
}

impl Moves {
    /// None: a number does not fit where it should go.
    fn apply(&self, old: &[u8]) -> Option<Vec<u8>> {
        let mut new = vec![0; self.size];
        for (from, to) in &self.moves {
            let source = from.bytes(old)?;
            let target = new.get_mut(to.offset..to.offset + to.element * to.count)?;
            for (source, target) in source.chunks(from.element).zip(target.chunks_mut(to.element)) {
                let width = source.len().min(target.len());
                // Numbers are little-endian wherever these programs run; those of the network's order never change their width.
                if source.get(width..)?.iter().any(|byte| *byte != 0) {
                    return None;
                }
                target.get_mut(..width)?.copy_from_slice(source.get(..width)?);
            }
        }
        Some(new)
    }
}

impl Conversion {
    /// From one pair of layouts to another; none if keys cannot be told from each other in it.
    pub(super) fn new(from: (&Layout, &Layout), to: (&Layout, &Layout)) -> Option<Self> {
        Some(Self { key: from.0.moves(to.0, true)?, value: from.1.moves(to.1, false)? })
    }

    /// An entry; none if it says what the other layout has no room for.
    pub(super) fn entry(&self, key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        Some((self.key.apply(key)?, self.value.apply(value)?))
    }
}

struct Type {
    kind: u32,
    /// `size` or `type`.
    word: u32,
    /// Of an array: element type and count. Of a struct: its members from here.
    rest: usize,
    members: usize,
}

/// Types as the kernel or the compiler describes them.
pub(super) struct Types<'b> {
    data: &'b [u8],
    strings: &'b [u8],
    types: Vec<Type>,
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl<'b> Types<'b> {
    /// From raw BTF; none if it is damaged, or of a kind that this does not know.
    pub(super) fn parse(raw: &'b [u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(raw.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        let header = word(raw, 4)? as usize;
        let part = |offset: usize| {
            let begin = header.checked_add(word(raw, offset)? as usize)?;
            raw.get(begin..begin.checked_add(word(raw, offset + 4)? as usize)?)
        };
        let (data, strings) = (part(8)?, part(16)?);
        let mut types = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let (info, value) = (word(data, at + 4)?, word(data, at + 8)?);
            let (members, kind) = ((info & 0xffff) as usize, (info >> 24) & 0x1f);
            let rest = at + 12;
            let more = match kind {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * members,
                kind::ENUM | kind::FUNC_PROTO => 8 * members,
                0..=kind::ENUM64 => 0,
                _ => return None,
            };
            types.push(Type { kind, word: value, rest, members });
            at = rest + more;
        }
        Some(Self { data, strings, types })
    }

    fn name(&self, offset: usize) -> Option<&str> {
        let text = self.strings.get(offset..)?;
        std::str::from_utf8(text.get(..text.iter().position(|byte| *byte == 0)?)?).ok()
    }

    /// What typedefs and qualifiers lead to. Id 0 is void, which nothing here is.
    fn resolve(&self, mut id: u32) -> Option<&Type> {
        for _ in 0..DEPTH_MAX {
            let found = self.types.get(usize::try_from(id).ok()?.checked_sub(1)?)?;
            match found.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => id = found.word,
                _ => return Some(found),
            }
        }
        None
    }

    fn size(&self, id: u32, depth: u32) -> Option<usize> {
        let found = self.resolve(id)?;
        match found.kind {
            kind::ARRAY if depth < DEPTH_MAX => {
                let count = word(self.data, found.rest + 8)? as usize;
                self.size(word(self.data, found.rest)?, depth + 1)?.checked_mul(count)
            }
            kind::INT | kind::STRUCT | kind::ENUM | kind::ENUM64 => Some(found.word as usize),
            _ => None,
        }
    }

    /// The layout of a type by id; none if it has what no key or value of ours has (pointers, unions, bit fields).
    pub(super) fn layout(&self, id: u32) -> Option<Layout> {
        let mut fields = Vec::new();
        self.collect(id, String::new(), 0, 0, &mut fields)?;
        Some(Layout { size: self.size(id, 0)?, fields })
    }

    fn collect(&self, id: u32, path: String, offset: usize, depth: u32, fields: &mut Vec<Field>) -> Option<()> {
        if depth > DEPTH_MAX || fields.len() > FIELDS_MAX {
            return None;
        }
        let found = self.resolve(id)?;
        match found.kind {
            kind::STRUCT => {
                for member in 0..found.members {
                    let at = found.rest + member * 12;
                    let (name, kind, bits) = (word(self.data, at)?, word(self.data, at + 4)?, word(self.data, at + 8)?);
                    if bits % 8 != 0 {
                        return None;
                    }
                    let name = self.name(name as usize)?;
                    let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
                    self.collect(kind, path, offset + bits as usize / 8, depth + 1, fields)?;
                }
            }
            kind::ARRAY => {
                let (element, count) = (word(self.data, found.rest)?, word(self.data, found.rest + 8)? as usize);
                let size = self.size(element, 0)?;
                if matches!(self.resolve(element)?.kind, kind::INT | kind::ENUM | kind::ENUM64) {
                    fields.push(Field { path, offset, element: size, count });
                } else {
                    for index in 0..count {
                        self.collect(element, format!("{path}[{index}]"), offset + index * size, depth + 1, fields)?;
                    }
                }
            }
            kind::INT | kind::ENUM | kind::ENUM64 => {
                fields.push(Field { path, offset, element: found.word as usize, count: 1 });
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(path: &str, offset: usize, element: usize, count: usize) -> Field {
        Field { path: path.to_owned(), offset, element, count }
    }

    fn layout(size: usize, fields: &[Field]) -> Layout {
        Layout { size, fields: fields.to_vec() }
    }

    #[test]
    fn fields_go_where_their_names_are_and_new_ones_are_zero() {
        let key = layout(4, &[field("id", 0, 4, 1)]);
        let old = layout(8, &[field("a", 0, 4, 1), field("mac", 4, 1, 2), field("pad", 6, 1, 2)]);
        let new = layout(16, &[field("fresh", 0, 8, 1), field("mac", 8, 1, 3), field("a", 12, 4, 1)]);
        let there = Conversion::new((&key, &old), (&key, &new)).unwrap();
        let (k, v) = there.entry(&[9, 0, 0, 0], &[1, 2, 3, 4, 5, 6, 7, 7]).unwrap();
        assert_eq!((k, v.clone()), (vec![9, 0, 0, 0], vec![0, 0, 0, 0, 0, 0, 0, 0, 5, 6, 0, 0, 1, 2, 3, 4]));
        let back = Conversion::new((&key, &new), (&key, &old)).unwrap();
        assert_eq!(back.entry(&[9, 0, 0, 0], &v).unwrap().1, [1, 2, 3, 4, 5, 6, 0, 0]);
    }

    #[test]
    fn numbers_are_widened_and_narrowed_only_if_they_fit() {
        let key = layout(4, &[field("id", 0, 4, 1)]);
        let (narrow, wide) = (layout(2, &[field("n", 0, 2, 1)]), layout(8, &[field("n", 0, 8, 1)]));
        let widened = Conversion::new((&key, &narrow), (&key, &wide)).unwrap().entry(&[0; 4], &[1, 2]).unwrap();
        assert_eq!(widened.1, [1, 2, 0, 0, 0, 0, 0, 0]);
        let narrowing = Conversion::new((&key, &wide), (&key, &narrow)).unwrap();
        assert_eq!(narrowing.entry(&[0; 4], &widened.1).unwrap().1, [1, 2]);
        assert!(narrowing.entry(&[0; 4], &[1, 2, 3, 0, 0, 0, 0, 0]).is_none());
    }

    #[test]
    fn keys_that_would_mean_something_else_are_not_carried() {
        let value = layout(4, &[field("v", 0, 4, 1)]);
        let (one, two) = (layout(4, &[field("a", 0, 4, 1)]), layout(8, &[field("a", 0, 4, 1), field("b", 4, 4, 1)]));
        assert!(Conversion::new((&one, &value), (&two, &value)).is_none(), "a field of the key is not known");
        assert!(Conversion::new((&two, &value), (&one, &value)).is_none(), "two entries would become one");
        let padded = layout(8, &[field("a", 0, 4, 1), field("pad", 4, 1, 4)]);
        assert!(Conversion::new((&one, &value), (&padded, &value)).is_some());
    }

    #[test]
    fn damaged_descriptions_are_none() {
        let object = crate::bpf::object::raw_types().unwrap();
        assert!(Types::parse(&object).is_some_and(|types| types.types.len() > 50));
        let all = |raw: &[u8]| Types::parse(raw).map(|types| (0..80).filter_map(|id| types.layout(id)).count());
        for cut in (0..object.len()).step_by(41) {
            all(&object[..cut]);
            let mut bent = object.clone();
            bent[cut] ^= 0x55;
            all(&bent);
        }
    }
}
