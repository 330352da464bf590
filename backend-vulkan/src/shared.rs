//! What shaders and programs share: push constants, table entries, and the numbers that name things. One definition
//! gives the Rust struct and its GLSL, of which `shaders/include/shared.glsl` is a copy that a test keeps true.
//!
//! Fields are laid out alike on both sides (GLSL's `scalar` layout, Rust's `repr(C)`): 8-byte fields come first, and the
//! macro refuses a struct with padding.

use bytemuck::{Pod, Zeroable};

/// A GLSL type that a field may have.
#[cfg(test)]
trait Field: Pod {
    const GLSL: &'static str;
}

/// Three numbers: elements from one index to the next of a row's three outer axes.
pub(crate) type Strides = [u32; 3];

#[cfg(test)]
impl Field for u64 {
    const GLSL: &'static str = "uint64_t";
}

#[cfg(test)]
impl Field for u32 {
    const GLSL: &'static str = "uint";
}

#[cfg(test)]
impl Field for f32 {
    const GLSL: &'static str = "float";
}

#[cfg(test)]
impl Field for Strides {
    const GLSL: &'static str = "uvec3";
}

macro_rules! shared {
    ($($(#[$about:meta])* struct $name:ident { $($field:ident: $type:ty,)* })*) => {
        $($(#[$about])*
        #[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
        #[repr(C)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
        })*

        #[cfg(test)]
        fn structs() -> String {
            let mut text = String::new();
            $(
                text += concat!("\nstruct ", stringify!($name), " {\n");
                $(text += &format!("    {} {};\n", <$type as Field>::GLSL, stringify!($field));)*
                text += "};\n";
            )*
            text
        }
    };
}

shared! {
    /// One operation of a chain: see `rows.comp`. Strides count elements.
    struct RowOp {
        a: u64,
        b: u64,
        out0: u64,
        out1: u64,
        a_strides: Strides,
        b_strides: Strides,
        out_strides: Strides,
        kind: u32,
        width: u32,
        width_b: u32,
        inner: u32,
        inner_extent: u32,
        groups_used: u32,
        flags: u32,
        factor: f32,
        padding: u32,
    }
    struct RowsPush {
        step: u64,
        table: u64,
        extent: u32,
        fixed_count: u32,
    }
    struct EmbedPush {
        step: u64,
        table: u64,
        ids: u64,
        y: u64,
        row_bytes: u32,
        width: u32,
        vocabulary: u32,
        extent: u32,
        fixed_count: u32,
        padding: u32,
    }
    /// One matrix product of a dispatch: see `product.glsl`. Strides of weights count bytes, others elements.
    struct ProductJob {
        w: u64,
        x: u64,
        y: u64,
        ids: u64,
        order: u64,
        first_group: u32,
        m: u32,
        k: u32,
        w_row: u32,
        w_batch: u32,
        x_row: u32,
        x_choice: u32,
        x_batch: u32,
        y_row: u32,
        y_choice: u32,
        y_batch: u32,
        used: u32,
        matrices: u32,
        order_tiles: u32,
        extent: u32,
        fixed_count: u32,
    }
    struct ProductPush {
        step: u64,
        table: u64,
        jobs: u32,
        first_group: u32,
    }
    struct GroupPush {
        step: u64,
        ids: u64,
        order: u64,
        used: u32,
        experts: u32,
        width: u32,
        order_tiles: u32,
        extent: u32,
        fixed_count: u32,
    }
    struct AttentionPush {
        step: u64,
        q: u64,
        cache: u64,
        y: u64,
        partial: u64,
        q_row: u32,
        q_head: u32,
        heads: u32,
        width: u32,
        latent: u32,
        cache_row: u32,
        chunk: u32,
        chunks: u32,
        scale: f32,
        first_row: u32,
        rows: u32,
        padding: u32,
    }
    struct MergePush {
        step: u64,
        partial: u64,
        y: u64,
        heads: u32,
        latent: u32,
        chunk: u32,
        chunks: u32,
    }
}

macro_rules! numbers {
    ($($name:ident = $value:expr;)*) => {
        $(pub(crate) const $name: u32 = $value;)*

        #[cfg(test)]
        fn constants() -> String {
            let mut text = String::new();
            $(text += &format!("#define {} {}\n", stringify!($name), $name);)*
            text
        }
    };
}

numbers! {
    MAX_EXPERTS = 1024;
    EXTENT_FIXED = 0;
    EXTENT_ROWS = 1;
    EXTENT_OUTPUTS = 2;
    ROW_RMS_NORM = 0;
    ROW_ROPE = 1;
    ROW_SWI_GLU = 2;
    ROW_ADD = 3;
    ROW_CONCAT = 4;
    ROW_SELECT = 5;
    ROW_CAST = 6;
    ROW_KV_STORE = 7;
    ROW_COMBINE = 8;
    ROW_ROUTE = 9;
    CAST_FROM_F16 = 1;
    CAST_TO_F16 = 2;
    CACHE_F32 = 0;
    CACHE_F16 = 1;
    CACHE_Q8_0 = 2;
    ROUTE_SOFTMAX = 1;
    ROUTE_RENORMALISE = 2;
}

/// The text of `shaders/include/shared.glsl`.
#[cfg(test)]
fn glsl() -> String {
    format!("// Written from src/shared.rs; a test compares.\n\n{}{}", constants(), structs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{env, fs, path::Path};

    #[test]
    fn shaders_see_the_same_structs() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders/include/shared.glsl");
        if env::var_os("FATHOM_UPDATE").is_some() {
            fs::write(&path, glsl()).expect("a writable checkout");
        }
        let found = fs::read_to_string(&path).expect("the file is there");
        assert!(
            found == glsl(),
            "shared.glsl is not what src/shared.rs says; run this test with FATHOM_UPDATE=1"
        );
    }

    #[test]
    fn push_constants_fit_every_device() {
        let sizes = [
            size_of::<RowsPush>(),
            size_of::<EmbedPush>(),
            size_of::<ProductPush>(),
            size_of::<GroupPush>(),
            size_of::<AttentionPush>(),
            size_of::<MergePush>(),
        ];
        assert!(sizes.iter().all(|size| *size <= 128), "{sizes:?}");
    }
}
