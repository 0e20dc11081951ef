//! A saved processor in named parts, for digests: a difference is reported by the registers that differ.
//!
//! The parts are the fields of the saved state as serde shows them, put together in groups that keep a digest
//! small. A field that a backend adds falls into `cpu.other` until it is named here.

use std::fmt::Display;

use hypervisor::VcpuState;
use serde::Serialize;
use serde::ser::{Impossible, SerializeStruct, Serializer};

/// The group of a field of [`hypervisor::soft::SoftState`] or [`hypervisor::kvm::KvmState`].
fn group(field: &str) -> &'static str {
    match field {
        "gpr" | "regs" => "cpu.general",
        "rip" => "cpu.rip",
        "rflags" => "cpu.rflags",
        "retired" | "anchor" | "clock" => "cpu.time",
        "segments" | "ldtr" | "tr" | "gdtr" | "idtr" | "sregs" => "cpu.segments",
        "cpl" | "interrupt_shadow" | "halted" | "pending_debug" | "mp_state" | "events" => {
            "cpu.mode"
        }
        "cr0" | "cr2" | "cr3" | "cr4" | "efer" | "xcrs" => "cpu.control",
        "dr" | "debug_regs" => "cpu.debug",
        "xmm" | "mxcsr" | "fpu" | "xsave" => "cpu.fpu",
        "msrs" => "cpu.msrs",
        "lapic" => "lapic",
        "ioapic" | "irqchips" => "ioapic",
        "nmi_requested" | "nmi_blocked" => "cpu.nmi",
        _ => "cpu.other",
    }
}

/// The parts of `state`, always the same ones in the same order.
#[must_use]
pub fn of_processor(state: &VcpuState) -> Vec<(&'static str, Vec<u8>)> {
    let mut splitter = Splitter { parts: Vec::new() };
    match state.serialize(&mut splitter) {
        Ok(()) => splitter.parts,
        // Not made of named fields: one part.
        Err(_) => vec![("cpu", crate::guest::encode(state))],
    }
}

/// Appends the encoding of each field of a structure to the part of its group.
struct Splitter {
    parts: Vec<(&'static str, Vec<u8>)>,
}

/// What is no structure cannot be split.
#[derive(Debug, thiserror::Error)]
#[error("the state has no named fields")]
struct NoFields;

impl serde::ser::Error for NoFields {
    fn custom<T: Display>(_: T) -> Self {
        Self
    }
}

impl SerializeStruct for &mut Splitter {
    type Ok = ();
    type Error = NoFields;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), NoFields> {
        // The interrupt controllers are a structure of their own.
        if name == "irqchip" {
            return value.serialize(&mut **self);
        }
        let bytes = postcard::to_stdvec(value).map_err(|_| NoFields)?;
        let group = group(name);
        match self.parts.iter_mut().find(|(name, _)| *name == group) {
            Some((_, part)) => part.extend(bytes),
            None => self.parts.push((group, bytes)),
        }
        Ok(())
    }

    fn end(self) -> Result<(), NoFields> {
        Ok(())
    }
}

macro_rules! no_fields {
    ($($method:ident($($value:ty),*);)*) => {
        $(fn $method(self, $(_: $value),*) -> Result<(), NoFields> {
            Err(NoFields)
        })*
    };
}

impl<'a> Serializer for &'a mut Splitter {
    type Ok = ();
    type Error = NoFields;
    type SerializeSeq = Impossible<(), NoFields>;
    type SerializeTuple = Impossible<(), NoFields>;
    type SerializeTupleStruct = Impossible<(), NoFields>;
    type SerializeTupleVariant = Impossible<(), NoFields>;
    type SerializeMap = Impossible<(), NoFields>;
    type SerializeStruct = &'a mut Splitter;
    type SerializeStructVariant = Impossible<(), NoFields>;

    no_fields! {
        serialize_bool(bool);
        serialize_i8(i8);
        serialize_i16(i16);
        serialize_i32(i32);
        serialize_i64(i64);
        serialize_u8(u8);
        serialize_u16(u16);
        serialize_u32(u32);
        serialize_u64(u64);
        serialize_f32(f32);
        serialize_f64(f64);
        serialize_char(char);
        serialize_str(&str);
        serialize_bytes(&[u8]);
        serialize_none();
        serialize_unit();
        serialize_unit_struct(&'static str);
        serialize_unit_variant(&'static str, u32, &'static str);
    }

    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<(), NoFields> {
        Err(NoFields)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), NoFields> {
        value.serialize(self)
    }

    /// The backend's state within [`VcpuState`].
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<(), NoFields> {
        value.serialize(self)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, NoFields> {
        Err(NoFields)
    }

    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, NoFields> {
        Err(NoFields)
    }

    fn serialize_tuple_struct(
        self,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleStruct, NoFields> {
        Err(NoFields)
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, NoFields> {
        Err(NoFields)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, NoFields> {
        Err(NoFields)
    }

    fn serialize_struct(
        self,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStruct, NoFields> {
        Ok(self)
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, NoFields> {
        Err(NoFields)
    }
}

#[cfg(test)]
mod tests {
    use hypervisor::Hypervisor;
    use hypervisor::soft::SoftHypervisor;

    use super::*;

    #[test]
    fn a_processor_is_split_into_its_registers() {
        let memory = hypervisor::memory::allocate(&[(0, 1 << 20)]).unwrap();
        let mut vm = SoftHypervisor.create_vm(memory).unwrap();
        let state = vm.create_vcpu(0).unwrap().save().unwrap();
        let parts = of_processor(&state);
        let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
        for name in ["cpu.general", "cpu.rip", "cpu.control", "cpu.fpu", "cpu.msrs", "lapic"] {
            assert!(names.contains(&name), "{name} is missing in {names:?}");
        }
        assert!(!names.contains(&"cpu.other"), "a field is in no group: {names:?}");
        // Nothing is left out: as many bytes as the whole has, without the tag of the backend.
        let bytes: usize = parts.iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(bytes + 1, crate::guest::encode(&state).len());
        assert_eq!(parts, of_processor(&state));
    }
}
