//! Offsets of kernel fields, from the running kernel's type information (BTF).
//!
//! Rust's BPF target has no CO-RE relocations, so the fields are looked up here at start. A field that
//! is not there, or that is a bit field, is an error that names it; nothing is guessed.
//! Format: <https://docs.kernel.org/bpf/btf.html>.

use std::ops::Range;

/// Why a kernel's BTF, or a field in it, cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// The data is not BTF of this byte order, or ends too early.
    #[error("the kernel's BTF cannot be read: {0}")]
    Malformed(&'static str),
    /// No such struct.
    #[error("this kernel has no struct {0}")]
    NoStruct(String),
    /// No such member.
    #[error("this kernel has no field {path} ({missing} not found)")]
    NoField {
        /// The whole path asked for.
        path: String,
        /// The part that is missing.
        missing: String,
    },
    /// A bit field has no byte offset.
    #[error("field {0} is a bit field in this kernel")]
    BitField(String),
}

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;
const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// A kernel's types.
pub struct KernelTypes {
    data: Vec<u8>,
    strings: Range<usize>,
    /// Where each type begins in `data`; type ids start at 1.
    starts: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    members: u32,
    /// Member offsets carry a bit-field size in their top byte.
    packs_bit_fields: bool,
    /// Size, or the type it refers to.
    size_or_type: u32,
    /// Where what follows the header begins.
    body: usize,
}

impl KernelTypes {
    /// Reads BTF in this machine's byte order.
    ///
    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let short = BtfError::Malformed("it ends within the header");
        if data.len() < HEADER_LEN {
            return Err(short);
        }
        if u16::from_ne_bytes([data[0], data[1]]) != MAGIC {
            return Err(BtfError::Malformed("wrong magic number"));
        }
        let word = |at: usize| word(&data, at).map(|word| word as usize);
        let header = word(4)?;
        let section = |from: usize, len: usize| -> Result<Range<usize>, BtfError> {
            let start = header
                .checked_add(word(from)?)
                .ok_or(BtfError::Malformed("an offset overflows"))?;
            let end = start
                .checked_add(word(len)?)
                .filter(|&end| end <= data.len())
                .ok_or(BtfError::Malformed("a section ends past the data"))?;
            Ok(start..end)
        };
        let types = section(8, 12)?;
        let strings = section(16, 20)?;
        let mut starts = vec![0];
        let mut at = types.start;
        while at < types.end {
            let start = u32::try_from(at).map_err(|_| BtfError::Malformed("it is over 4 GiB"))?;
            starts.push(start);
            let ty = type_at(&data, at)?;
            at = ty.body + body_len(ty)?;
        }
        Ok(Self {
            data,
            strings,
            starts,
        })
    }

    /// Offset in bytes of a field within its struct, by a path such as `sock.__sk_common.skc_num`.
    /// Anonymous structs and unions are looked through; a pointer ends the path.
    ///
    /// # Errors
    /// [`BtfError::NoStruct`], [`BtfError::NoField`], [`BtfError::BitField`].
    pub fn offset(&self, path: &str) -> Result<u32, BtfError> {
        let mut names = path.split('.');
        let root = names.next().unwrap_or_default();
        let mut current = self
            .find(KIND_STRUCT, root)
            .ok_or_else(|| BtfError::NoStruct(root.to_owned()))?;
        let mut bits = 0;
        for name in names {
            let (offset, member) =
                self.member(current, name, path)?
                    .ok_or_else(|| BtfError::NoField {
                        path: path.to_owned(),
                        missing: name.to_owned(),
                    })?;
            bits += offset;
            // A member that is no struct has no members: a longer path then ends with NoField.
            current = self.resolve(member)?;
        }
        if bits % 8 != 0 {
            return Err(BtfError::BitField(path.to_owned()));
        }
        Ok(bits / 8)
    }

    /// How many arguments a tracepoint passes to its programs; none when there is no such tracepoint.
    #[must_use]
    pub fn tracepoint_arguments(&self, tracepoint: &str) -> Option<u32> {
        let typedef = self.find(KIND_TYPEDEF, &format!("btf_trace_{tracepoint}"))?;
        let pointer = self.get(typedef.size_or_type).ok()?;
        let prototype = self.get(pointer.size_or_type).ok()?;
        // The first parameter is the tracepoint's private data.
        (prototype.kind == KIND_FUNC_PROTO).then(|| prototype.members.saturating_sub(1))
    }

    /// Whether any type, field or enumerator has this name.
    #[must_use]
    pub fn has_name(&self, name: &str) -> bool {
        let strings = &self.data[self.strings.clone()];
        let mut names = strings.split(|&byte| byte == 0);
        names.any(|known| known == name.as_bytes())
    }

    /// BTF with the same type ids, of which only the types of tracepoints and iterators have a name and nothing has a
    /// body: all that it takes to attach to them, in a tenth of the memory once parsed.
    ///
    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn hooks(&self) -> Result<Vec<u8>, BtfError> {
        let (mut types, mut strings) = (Vec::new(), vec![0]);
        let mut end = 0;
        for &start in &self.starts[1..] {
            let ty = type_at(&self.data, start as usize)?;
            let name = self.string(ty.name);
            let named = match ty.kind {
                KIND_TYPEDEF => name.starts_with(b"btf_trace_"),
                KIND_FUNC => name.starts_with(b"bpf_iter_"),
                _ => false,
            };
            let words = if named {
                let at = strings.len() as u32;
                strings.extend_from_slice(name);
                strings.push(0);
                [at, ty.kind << 24, 0]
            } else {
                [0, KIND_FWD << 24, 0]
            };
            types.extend(words.into_iter().flat_map(u32::to_ne_bytes));
            if named {
                end = types.len();
            }
        }
        types.truncate(end);
        let (types_len, strings_len) = (types.len() as u32, strings.len() as u32);
        let mut data = MAGIC.to_ne_bytes().to_vec();
        data.extend([1, 0]);
        for word in [HEADER_LEN as u32, 0, types_len, types_len, strings_len] {
            data.extend(word.to_ne_bytes());
        }
        data.extend(types);
        data.extend(strings);
        Ok(data)
    }

    fn member(&self, of: Type, name: &str, path: &str) -> Result<Option<(u32, u32)>, BtfError> {
        if of.kind != KIND_STRUCT && of.kind != KIND_UNION {
            return Ok(None);
        }
        for index in 0..of.members as usize {
            let at = of.body + index * 12;
            let member_name = word(&self.data, at)?;
            let member_type = word(&self.data, at + 4)?;
            let mut offset = word(&self.data, at + 8)?;
            let mut bit_field = false;
            if of.packs_bit_fields {
                bit_field = offset >> 24 != 0;
                offset &= 0x00ff_ffff;
            }
            if member_name == 0 {
                let inner = self.resolve(member_type)?;
                if let Some((inner_offset, found)) = self.member(inner, name, path)? {
                    return Ok(Some((offset + inner_offset, found)));
                }
            } else if self.is_called(member_name, name) {
                if bit_field {
                    return Err(BtfError::BitField(path.to_owned()));
                }
                return Ok(Some((offset, member_type)));
            }
        }
        Ok(None)
    }

    /// The type behind typedefs and qualifiers.
    fn resolve(&self, id: u32) -> Result<Type, BtfError> {
        let mut ty = self.get(id)?;
        // A chain longer than this is a loop.
        for _ in 0..32 {
            match ty.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    ty = self.get(ty.size_or_type)?;
                }
                _ => return Ok(ty),
            }
        }
        Err(BtfError::Malformed("a type refers to itself"))
    }

    fn find(&self, kind: u32, name: &str) -> Option<Type> {
        self.starts[1..]
            .iter()
            .filter_map(|&start| type_at(&self.data, start as usize).ok())
            .find(|ty| ty.kind == kind && self.is_called(ty.name, name))
    }

    fn get(&self, id: u32) -> Result<Type, BtfError> {
        match self.starts.get(id as usize) {
            Some(&start) if id != 0 => type_at(&self.data, start as usize),
            _ => Err(BtfError::Malformed("a type id is out of range")),
        }
    }

    fn is_called(&self, offset: u32, name: &str) -> bool {
        self.string(offset) == name.as_bytes()
    }

    fn string(&self, offset: u32) -> &[u8] {
        let strings = self.data[self.strings.clone()].get(offset as usize..);
        let mut parts = strings.unwrap_or_default().split(|&byte| byte == 0);
        parts.next().unwrap_or_default()
    }
}

fn word(data: &[u8], at: usize) -> Result<u32, BtfError> {
    data.get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u32::from_ne_bytes)
        .ok_or(BtfError::Malformed("it ends within a type"))
}

fn type_at(data: &[u8], at: usize) -> Result<Type, BtfError> {
    let info = word(data, at + 4)?;
    Ok(Type {
        name: word(data, at)?,
        kind: info >> 24 & 0x1f,
        members: info & 0xffff,
        packs_bit_fields: info >> 31 == 1,
        size_or_type: word(data, at + 8)?,
        body: at + 12,
    })
}

fn body_len(ty: Type) -> Result<usize, BtfError> {
    let members = ty.members as usize;
    Ok(match ty.kind {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => members * 12,
        KIND_ENUM | KIND_FUNC_PROTO => members * 8,
        KIND_PTR..=KIND_TYPE_TAG => 0,
        _ => {
            return Err(BtfError::Malformed(
                "it has a kind of type newer than this agent",
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes BTF by hand: enough of an assembler for a few types.
    struct Writer {
        types: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Writer {
        fn new() -> Self {
            Self {
                types: Vec::new(),
                strings: vec![0],
            }
        }

        fn name(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            at
        }

        fn words(&mut self, words: &[u32]) {
            self.types
                .extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        }

        fn structure(&mut self, name: &str, kind: u32, flag: bool, members: &[(&str, u32, u32)]) {
            let name = self.name(name);
            let info = kind << 24 | members.len() as u32 | u32::from(flag) << 31;
            self.words(&[name, info, 64]);
            for (member, ty, offset) in members {
                let member = self.name(member);
                self.words(&[member, *ty, *offset]);
            }
        }

        fn finish(self) -> Vec<u8> {
            let mut data = MAGIC.to_ne_bytes().to_vec();
            data.extend([1, 0]);
            for word in [
                HEADER_LEN as u32,
                0,
                self.types.len() as u32,
                self.types.len() as u32,
                self.strings.len() as u32,
            ] {
                data.extend(word.to_ne_bytes());
            }
            data.extend(self.types);
            data.extend(self.strings);
            data
        }
    }

    fn example() -> KernelTypes {
        let mut w = Writer::new();
        let int = w.name("int");
        w.words(&[int, KIND_INT << 24, 4, 32]); // 1
        w.structure("", KIND_UNION, false, &[("a", 1, 0), ("b", 1, 0)]); // 2
        w.structure("inner", KIND_STRUCT, false, &[("", 2, 64), ("c", 1, 96)]); // 3
        let alias = w.name("alias");
        w.words(&[alias, KIND_TYPEDEF << 24, 3]); // 4
        let outer = [("x", 1, 0), ("in", 4, 128), ("flag", 1, 3 << 24 | 7)];
        w.structure("outer", KIND_STRUCT, true, &outer); // 5
        w.words(&[0, KIND_FUNC_PROTO << 24 | 3, 0, 0, 1, 0, 1, 0, 1]); // 6
        w.words(&[0, KIND_PTR << 24, 6]); // 7
        let trace = w.name("btf_trace_thing");
        w.words(&[trace, KIND_TYPEDEF << 24, 7]); // 8
        let walk = w.name("bpf_iter_thing");
        w.words(&[walk, KIND_FUNC << 24, 6]); // 9
        KernelTypes::parse(w.finish()).expect("well-formed")
    }

    #[test]
    fn fields_are_found_through_typedefs_and_anonymous_unions() {
        let types = example();
        assert_eq!(types.offset("outer.x"), Ok(0));
        assert_eq!(types.offset("outer.in.b"), Ok(24));
        assert_eq!(types.offset("outer.in.c"), Ok(28));
    }

    #[test]
    fn what_is_missing_is_named() {
        let types = example();
        let error = types.offset("outer.in.zzz").unwrap_err();
        assert_eq!(
            error.to_string(),
            "this kernel has no field outer.in.zzz (zzz not found)"
        );
        assert_eq!(
            types.offset("nobody.x"),
            Err(BtfError::NoStruct("nobody".to_owned()))
        );
        assert_eq!(
            types.offset("outer.flag"),
            Err(BtfError::BitField("outer.flag".to_owned()))
        );
        assert!(types.offset("outer.x.y").is_err(), "an int has no members");
    }

    #[test]
    fn a_tracepoints_arguments_are_counted_without_its_private_data() {
        assert_eq!(example().tracepoint_arguments("thing"), Some(2));
        assert_eq!(example().tracepoint_arguments("other"), None);
    }

    #[test]
    fn hooks_alone_keep_their_type_ids() {
        let types = example();
        let alone = types.hooks().expect("well-formed");
        assert!(aya::Btf::parse(&alone, aya::Endianness::default()).is_ok());
        let alone = KernelTypes::parse(alone).expect("BTF");
        let trace = alone.get(8).expect("its own id");
        assert!(trace.kind == KIND_TYPEDEF && alone.is_called(trace.name, "btf_trace_thing"));
        let walk = alone.get(9).expect("its own id");
        assert!(walk.kind == KIND_FUNC && alone.is_called(walk.name, "bpf_iter_thing"));
        assert!(alone.find(KIND_TYPEDEF, "alias").is_none(), "it is neither");
    }

    #[test]
    fn the_running_kernels_types_are_read() {
        let Ok(data) = std::fs::read("/sys/kernel/btf/vmlinux") else {
            println!("not run: this kernel has no BTF");
            return;
        };
        let types = KernelTypes::parse(data).expect("the kernel's own BTF is well-formed");
        let pid = types
            .offset("task_struct.pid")
            .expect("every kernel has it");
        let tgid = types
            .offset("task_struct.tgid")
            .expect("every kernel has it");
        assert_eq!(tgid, pid + 4, "sched.h declares them side by side");
    }

    proptest! {
        #[test]
        fn damaged_data_is_an_error_and_never_a_panic(
            at in 0usize..200, value: u8, len in 0usize..400,
        ) {
            let mut data = example().data;
            let at = at % data.len();
            data[at] = value;
            data.truncate(len);
            if let Ok(types) = KernelTypes::parse(data) {
                let _ = types.offset("outer.in.b");
                let _ = types.tracepoint_arguments("thing");
            }
        }
    }
}
