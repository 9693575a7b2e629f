//! A pickle reader that can build tensors and nothing else.
//!
//! A Python pickle is a program for a stack machine which may call any importable function. This machine has the
//! opcodes that a file of tensors needs (protocols 2 to 5) and a closed list of names; everything else is an error that
//! names what was refused. Nothing is ever imported or executed. Objects live in arenas and refer to each other by
//! index, so neither reading nor dropping recurses, and memory is at most proportional to the size of the pickle.
//!
//! Reference: the opcode descriptions in CPython's `Lib/pickletools.py` and torch's `_weights_only_unpickler.py`.

use super::tensor::Dtype;
use std::collections::HashMap;

/// A state dict of ten thousand tensors needs a megabyte.
pub(super) const MAX_PICKLE: usize = 64 << 20;

/// Why a pickle is refused.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum PickleError {
    #[error("the pickle ends in the middle of an instruction (at byte {0})")]
    Truncated(usize),
    #[error(
        "the pickle imports {0}, which is not part of a file of tensors; nothing was executed. \
        If the file is trustworthy, load it in Python and save its state_dict() alone"
    )]
    Import(String),
    #[error(
        "the pickle uses the instruction {name} (0x{code:02x}, at byte {at}), which a file of tensors does not need; \
        nothing was executed"
    )]
    Instruction { code: u8, name: &'static str, at: usize },
    #[error("the pickle is damaged at byte {at}: {what}")]
    Damaged { at: usize, what: String },
    #[error("{0}")]
    Content(String),
}

/// A torch storage type: the number format of the tensors in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StorageType {
    /// As errors call it.
    pub(super) name: &'static str,
    /// Where it is one that weights are kept in.
    pub(super) dtype: Option<Dtype>,
}

const STORAGE_TYPES: [(&str, StorageType); 10] = [
    ("FloatStorage", StorageType { name: "F32", dtype: Some(Dtype::F32) }),
    ("HalfStorage", StorageType { name: "F16", dtype: Some(Dtype::F16) }),
    ("BFloat16Storage", StorageType { name: "BF16", dtype: Some(Dtype::BF16) }),
    ("DoubleStorage", StorageType { name: "F64", dtype: None }),
    ("LongStorage", StorageType { name: "I64", dtype: None }),
    ("IntStorage", StorageType { name: "I32", dtype: None }),
    ("ShortStorage", StorageType { name: "I16", dtype: None }),
    ("CharStorage", StorageType { name: "I8", dtype: None }),
    ("ByteStorage", StorageType { name: "U8", dtype: None }),
    ("BoolStorage", StorageType { name: "BOOL", dtype: None }),
];

/// A reference to a record of raw numbers beside the pickle.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Storage {
    pub(super) key: String,
    pub(super) kind: StorageType,
    /// Elements.
    pub(super) numel: usize,
}

/// A view into a storage; sizes, offset and strides in elements, not yet checked against the record.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorView {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// Runs a pickle and returns the tensors of the dictionary that it makes, in its order.
pub(super) fn state_dict(pickle: &[u8]) -> Result<Vec<(String, TensorView)>> {
    let mut m = Machine { pickle, ..Machine::default() };
    let top = m.run()?;
    let Value::Dict(d) = top else {
        let what = top.describe();
        return Err(PickleError::Content(format!("it holds {what}; expected a dictionary of tensors by name")));
    };
    let mut seen = std::collections::HashSet::new();
    let mut all = Vec::with_capacity(m.dicts[d].len());
    for &(key, value) in &m.dicts[d] {
        let Value::Text(k) = key else {
            return Err(PickleError::Content(format!("a key is {}; expected the name of a tensor", key.describe())));
        };
        let name = &m.texts[k];
        let Value::Tensor(t) = value else {
            let what = value.describe();
            return Err(PickleError::Content(format!("entry \"{name}\" is {what}; expected a tensor")));
        };
        if !seen.insert(name) {
            return Err(PickleError::Content(format!("tensor {name} is there twice")));
        }
        all.push((name.clone(), m.tensors[t].clone()));
    }
    Ok(all)
}

/// A Python value. Those with contents are indices into the machine's arenas.
#[derive(Debug, Clone, Copy)]
enum Value {
    None,
    Bool,
    Int(i64),
    Float,
    Text(usize),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Callable(Callable),
    StorageType(StorageType),
    Storage(usize),
    Tensor(usize),
}

/// The functions that a file of tensors calls, as this machine understands them.
#[derive(Debug, Clone, Copy)]
enum Callable {
    OrderedDict,
    /// `_rebuild_tensor(storage, offset, size, stride)`, and `_v2` with (requires_grad, hooks[, metadata]) after it.
    RebuildTensor,
    /// `_rebuild_parameter(tensor, requires_grad, hooks)`, and `_with_state` with attributes after it.
    RebuildParameter,
}

impl Value {
    fn describe(self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool => "a boolean",
            Value::Int(_) => "an integer",
            Value::Float => "a float",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::List(_) => "a list",
            Value::Dict(_) => "a dictionary",
            Value::Callable(_) | Value::StorageType(_) => "a function or class",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

#[derive(Default)]
struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack at the marks that are still open.
    marks: Vec<usize>,
    memo: HashMap<usize, Value>,
    texts: Vec<String>,
    tuples: Vec<Vec<Value>>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    tensors: Vec<TensorView>,
}

type Result<T> = std::result::Result<T, PickleError>;

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value> {
        if self.pickle.len() > MAX_PICKLE {
            let what = format!("it has {} bytes; expected at most {MAX_PICKLE}", self.pickle.len());
            return Err(PickleError::Damaged { at: 0, what });
        }
        loop {
            let start = self.at;
            match self.byte()? {
                b'.' => return self.pop(),
                code => self.step(code, start)?,
            }
        }
    }

    fn step(&mut self, code: u8, start: usize) -> Result<()> {
        match code {
            0x80 => match self.byte()? {
                2..=5 => {}
                v => return Err(self.damaged(format!("pickle protocol {v}; expected 2 to 5"))),
            },
            0x95 => {
                self.take(8)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => {
                let v = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(v.into()));
            }
            b'K' => {
                let v = self.byte()?;
                self.stack.push(Value::Int(v.into()));
            }
            b'M' => {
                let v = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(v.into()));
            }
            0x8a => {
                let n = self.byte()?;
                self.long(n.into())?;
            }
            0x8b => {
                let n = u32::from_le_bytes(self.array()?);
                self.long(n as usize)?;
            }
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            b'X' | b'T' => {
                let n = u32::from_le_bytes(self.array()?);
                self.text(n as usize)?;
            }
            0x8c | b'U' => {
                let n = self.byte()?;
                self.text(n.into())?;
            }
            0x8d => {
                let n = u64::from_le_bytes(self.array()?);
                self.text(usize::try_from(n).unwrap_or(usize::MAX))?;
            }
            b')' => self.tuple(Vec::new()),
            b't' => {
                let items = self.pop_mark()?;
                self.tuple(items);
            }
            0x85..=0x87 => {
                let n = usize::from(code - 0x84);
                let items = self.pop_n(n)?;
                self.tuple(items);
            }
            b']' => {
                self.stack.push(Value::List(self.lists.len()));
                self.lists.push(Vec::new());
            }
            b'l' => {
                let items = self.pop_mark()?;
                self.stack.push(Value::List(self.lists.len()));
                self.lists.push(items);
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(items)?;
            }
            b'}' => self.dict(Vec::new())?,
            b'd' => {
                let items = self.pop_mark()?;
                self.dict(items)?;
            }
            b's' => {
                let items = self.pop_n(2)?;
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(items)?;
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                let v = global(&module, &name)?;
                self.stack.push(v);
            }
            0x93 => {
                let names = self.pop_n(2)?;
                let [Value::Text(module), Value::Text(name)] = names[..] else {
                    return Err(self.damaged("an import without a name"));
                };
                let v = global(&self.texts[module], &self.texts[name])?;
                self.stack.push(v);
            }
            b'R' => self.call()?,
            b'b' => {
                // Attributes of an object. torch gives a state dict `_metadata` (versions of modules), which does not
                // change any tensor; on anything else attributes could mean something.
                self.pop()?;
                let Value::Dict(_) = self.top()? else {
                    return Err(self.damaged("attributes are set on something that is not a dictionary"));
                };
            }
            b'Q' => self.storage()?,
            b'h' => {
                let i = self.byte()?;
                self.recall(i.into())?;
            }
            b'j' => {
                let i = u32::from_le_bytes(self.array()?);
                self.recall(i as usize)?;
            }
            b'q' => {
                let i = self.byte()?;
                self.memorise(i.into())?;
            }
            b'r' => {
                let i = u32::from_le_bytes(self.array()?);
                self.memorise(i as usize)?;
            }
            0x94 => self.memorise(self.memo.len())?,
            _ => return Err(PickleError::Instruction { code, name: instruction_name(code), at: start }),
        }
        Ok(())
    }

    fn damaged(&self, what: impl Into<String>) -> PickleError {
        PickleError::Damaged { at: self.at, what: what.into() }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.pickle.len());
        let end = end.ok_or(PickleError::Truncated(self.at))?;
        let bytes = &self.pickle[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// A line of text, without its end.
    fn line(&mut self) -> Result<String> {
        let rest = &self.pickle[self.at..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or(PickleError::Truncated(self.at))?;
        let line = String::from_utf8_lossy(&rest[..n]).into_owned();
        self.at += n + 1;
        Ok(line)
    }

    fn long(&mut self, n: usize) -> Result<()> {
        if n > 8 {
            return Err(self.damaged(format!("an integer of {n} bytes; expected at most 8")));
        }
        let bytes = self.take(n)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        wide[..n].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn text(&mut self, n: usize) -> Result<()> {
        let at = self.at;
        let text = std::str::from_utf8(self.take(n)?).map(String::from);
        let text = text.map_err(|_| PickleError::Damaged { at, what: "a text that is not UTF-8".into() })?;
        self.stack.push(Value::Text(self.texts.len()));
        self.texts.push(text);
        Ok(())
    }

    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Value> {
        let above = &self.stack[self.floor()..];
        above.last().copied().ok_or_else(|| self.damaged("the stack is empty"))
    }

    fn pop(&mut self) -> Result<Value> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Value>> {
        if self.stack.len() - self.floor() < n {
            return Err(self.damaged("the stack is empty"));
        }
        Ok(self.stack.split_off(self.stack.len() - n))
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("there is no mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn recall(&mut self, i: usize) -> Result<()> {
        let v = self.memo.get(&i).copied();
        self.stack.push(v.ok_or_else(|| self.damaged(format!("memo {i} is empty")))?);
        Ok(())
    }

    fn memorise(&mut self, i: usize) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(i, top);
        Ok(())
    }

    fn tuple(&mut self, items: Vec<Value>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn append(&mut self, items: Vec<Value>) -> Result<()> {
        let Value::List(l) = self.top()? else {
            return Err(self.damaged("something is appended to what is not a list"));
        };
        self.lists[l].extend(items);
        Ok(())
    }

    fn dict(&mut self, items: Vec<Value>) -> Result<()> {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
        self.set_items(items)
    }

    fn set_items(&mut self, items: Vec<Value>) -> Result<()> {
        let Value::Dict(d) = self.top()? else {
            return Err(self.damaged("entries are set on what is not a dictionary"));
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.damaged("a key without a value"));
        }
        self.dicts[d].extend(pairs.iter().map(|&[k, v]| (k, v)));
        Ok(())
    }

    fn call(&mut self) -> Result<()> {
        let items = self.pop_n(2)?;
        let [Value::Callable(function), Value::Tuple(args)] = items[..] else {
            return Err(self.damaged("something that is not a function is called"));
        };
        let args = self.tuples[args].clone();
        match (function, &args[..]) {
            (Callable::OrderedDict, []) => self.dict(Vec::new()),
            (Callable::RebuildTensor, &[storage, offset, size, stride, ref rest @ ..]) => {
                // The seventh argument of _rebuild_tensor_v2 marks views that are negated or conjugated.
                let plain = match rest.get(2) {
                    None | Some(Value::None) => true,
                    Some(Value::Dict(d)) => self.dicts[*d].is_empty(),
                    Some(_) => false,
                };
                if !plain || rest.len() > 3 {
                    return Err(PickleError::Content("a tensor has metadata that this program does not know".into()));
                }
                let Value::Storage(s) = storage else {
                    return Err(self.damaged("a tensor without a storage"));
                };
                let view = TensorView {
                    storage: self.storages[s].clone(),
                    offset: self.size(offset)?,
                    shape: self.sizes(size)?,
                    strides: self.sizes(stride)?,
                };
                if view.shape.len() != view.strides.len() {
                    return Err(self.damaged("a tensor with more sizes than strides, or fewer"));
                }
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(view);
                Ok(())
            }
            (
                Callable::RebuildParameter,
                &[tensor @ Value::Tensor(_), _, _] | &[tensor @ Value::Tensor(_), _, _, _],
            ) => {
                self.stack.push(tensor);
                Ok(())
            }
            _ => Err(self.damaged("a function is called with arguments that it does not take")),
        }
    }

    fn size(&self, v: Value) -> Result<usize> {
        match v {
            Value::Int(n) if n >= 0 => Ok(n as usize),
            _ => Err(self.damaged("a size or an offset that is not a whole number from 0")),
        }
    }

    fn sizes(&self, v: Value) -> Result<Vec<usize>> {
        let items = match v {
            Value::Tuple(t) => &self.tuples[t],
            Value::List(l) => &self.lists[l],
            _ => return Err(self.damaged("sizes that are not a tuple")),
        };
        if items.len() > 8 {
            return Err(self.damaged(format!("a tensor of {} dimensions; expected at most 8", items.len())));
        }
        items.iter().map(|&v| self.size(v)).collect()
    }

    /// A persistent id: ("storage", type, key, device, elements).
    fn storage(&mut self) -> Result<()> {
        let Value::Tuple(t) = self.pop()? else {
            return Err(self.damaged("a persistent id that is not a tuple"));
        };
        let [Value::Text(word), Value::StorageType(kind), Value::Text(key), Value::Text(_), numel] = self.tuples[t][..]
        else {
            return Err(self.damaged("a persistent id that is not a torch storage"));
        };
        if self.texts[word] != "storage" {
            return Err(self.damaged("a persistent id that is not a torch storage"));
        }
        let storage = Storage { key: self.texts[key].clone(), kind, numel: self.size(numel)? };
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push(storage);
        Ok(())
    }
}

fn global(module: &str, name: &str) -> Result<Value> {
    let callable = match (module, name) {
        ("collections", "OrderedDict") => Some(Callable::OrderedDict),
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Some(Callable::RebuildTensor),
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Some(Callable::RebuildParameter),
        _ => None,
    };
    let storage = || STORAGE_TYPES.iter().find(|s| module == "torch" && s.0 == name).map(|s| Value::StorageType(s.1));
    let found = callable.map(Value::Callable).or_else(storage);
    found.ok_or_else(|| PickleError::Import(format!("{module}.{name}")))
}

fn instruction_name(code: u8) -> &'static str {
    match code {
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        0x82..=0x84 => "EXT",
        b'P' => "PERSID",
        b'I' | b'L' | b'F' | b'S' | b'V' | b'g' | b'p' => "one of protocol 0",
        b'B' | b'C' | 0x8e | 0x96 => "BYTES",
        0x8f..=0x91 => "SET",
        0x97 | 0x98 => "BUFFER",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(pickle: &[u8]) -> String {
        state_dict(pickle).unwrap_err().to_string()
    }

    #[test]
    fn nothing_but_tensors_can_be_imported() {
        // cos\nsystem\n(S'...'\ntR. in protocol 0 and its equivalents in protocols 2 and 4.
        for (module, name) in [
            ("os", "system"),
            ("posix", "system"),
            ("builtins", "eval"),
            ("subprocess", "Popen"),
            ("torch", "load"),
            ("torch.storage", "_load_from_bytes"),
            ("torch._utils", "_rebuild_tensor_v3"),
            ("collections", "namedtuple"),
            ("__builtin__", "getattr"),
            ("os", "FloatStorage"),
        ] {
            let text = b"X\x04\x00\x00\x00true\x85R.";
            let mut p = b"\x80\x02c".to_vec();
            p.extend(format!("{module}\n{name}\n").bytes());
            p.extend(text);
            let e = error(&p);
            assert!(e.contains(&format!("{module}.{name}")) && e.contains("nothing was executed"), "{e}");

            let mut p = b"\x80\x04".to_vec();
            for s in [module, name] {
                p.push(0x8c);
                p.push(s.len() as u8);
                p.extend(s.bytes());
            }
            p.push(0x93);
            p.extend(text);
            let e = error(&p);
            assert!(e.contains(&format!("{module}.{name}")), "{e}");
        }
    }

    #[test]
    fn other_ways_to_run_code_are_instructions_that_do_not_exist() {
        for (p, word) in [
            (&b"(S'echo'\nios\nsystem\n."[..], "0x53"),
            (b"\x80\x02(ios\nsystem\n.", "INST"),
            (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
            (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
            (b"\x80\x02P0\n.", "PERSID"),
            (b"\x80\x02\x82\x01.", "EXT"),
        ] {
            let e = error(p);
            assert!(e.contains(word), "{word}: {e}");
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        for p in [
            &b""[..],
            b".",
            b"\x80",
            b"\x80\x09.",
            b"\x80\x02(.",
            b"\x80\x02)R.",
            b"\x80\x02N)R.",
            b"\x80\x02}K\x01s.",
            b"\x80\x02h\x05.",
            b"\x80\x02X\xff\xff\xff\x7fab.",
            b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.",
            b"\x80\x02\x8a\xffabc.",
            b"\x80\x02cos",
            b"\x80\x02(t0000.",
            b"\x80\x02}(K\x01u.",
            b"\x80\x02]K\x01K\x02s.",
            b"\x80\x02NN\x93.",
            b"\x80\x02)Q.",
            b"\x80\x02NNb.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        ] {
            let e = error(p);
            assert!(!e.is_empty(), "{p:?}");
        }
    }

    #[test]
    fn every_truncation_and_many_flips_of_a_real_pickle_are_survived() {
        let real = super::super::torch::tests::small_pickle();
        assert!(state_dict(&real).is_ok());
        for n in 0..real.len() {
            assert!(state_dict(&real[..n]).is_err(), "{n}");
        }
        for i in 0..real.len() {
            for bit in 0..8 {
                let mut p = real.clone();
                p[i] ^= 1 << bit;
                let _ = state_dict(&p);
            }
        }
    }

    #[test]
    fn deep_nesting_does_not_recurse() {
        let mut p = b"\x80\x02N".to_vec();
        p.extend(std::iter::repeat_n(0x85, 3_000_000));
        p.push(b'.');
        assert!(error(&p).contains("a tuple"));
        let mut p = b"\x80\x02".to_vec();
        p.extend(std::iter::repeat_n(b'(', 3_000_000));
        p.push(b'.');
        assert!(error(&p).contains("stack is empty"));
    }

    #[test]
    fn other_contents_are_named() {
        assert!(error(b"\x80\x02}X\x05\x00\x00\x00epochK\x03s.").contains("\"epoch\" is an integer"));
        assert!(error(b"\x80\x02].").contains("a list"));
        assert!(error(b"\x80\x02}K\x03Ns.").contains("a key is an integer"));
    }
}
