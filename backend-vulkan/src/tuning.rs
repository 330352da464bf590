//! How work is cut for a class of devices, and in what numbers its products are computed. Where those are f32, results
//! differ between classes only in the order of sums.

use crate::capabilities::Capabilities;
use backend_api::{Capacity, DType};
use std::iter;

/// Kinds of devices that want work cut alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceClass {
    /// Shaders run on the CPU: few, large work groups, and few dispatches.
    Software,
    /// Thousands of invocations at once.
    Gpu,
}

/// In what numbers products of many columns are computed beside a quantised weight, where they need not be exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 throughout.
    Floats,
    /// Activations are rounded to 8 bits, with a scale for 16 of them, and multiplied with the levels of weights in
    /// integers (`VK_KHR_shader_integer_dot_product`).
    IntegerDots,
    /// Both are rounded to 16-bit floats, products are summed in f32 (`VK_KHR_cooperative_matrix`).
    CooperativeMatrices,
}

/// The numbers that follow from the class.
#[derive(Clone, Debug)]
pub(crate) struct Tuning {
    pub class: DeviceClass,
    pub subgroup: u32,
    arithmetic: Arithmetic,
    /// Rows, columns and depth of cooperative matrices, for that arithmetic.
    matrix: [u32; 3],
    /// Invocations that work on a row together, where there are many, and where there is one.
    row_threads: [u32; 2],
    /// Multiply-accumulates in a second, about; to cut long programs.
    pub macs_per_second: f64,
    /// Rows of steps up to which programs have forms of their own.
    few_rows: &'static [usize],
    /// Cached rows up to which they have; beyond, up to four times as many, and so on.
    depth: usize,
    /// Cached rows below which a cache is not cut into chunks.
    chunk: u32,
    /// Work groups that fill the device.
    groups: u32,
    /// Likewise, of matrix products.
    product_groups: u32,
    /// Bytes of memory that a work group may share.
    shared_memory: u32,
}

/// How a matrix product is cut.
#[derive(Clone, Debug)]
pub(crate) struct ProductShape {
    /// Its shader is `product_KERNEL_FORMAT`.
    pub kernel: &'static str,
    /// What the shader is specialised by, but for the last: whether activations are loaded together.
    pub constants: Vec<u32>,
    /// Activations that are loaded together where all lie so.
    pub together: u32,
    /// Rows of weights of each work group.
    pub rows: u32,
    pub whole_subgroups: bool,
}

/// What a work group of `product_tiled.comp` has at once: rows of weights and columns of activations, of which each
/// invocation has some.
#[derive(Clone, Copy, Debug)]
struct Tile {
    rows: u32,
    columns: u32,
    own_rows: u32,
    own_columns: u32,
}

/// From small to large. A large one reads less, as long as there are enough to fill the device.
const TILES: [Tile; 5] = [
    Tile { rows: 64, columns: 16, own_rows: 4, own_columns: 4 },
    Tile { rows: 32, columns: 32, own_rows: 4, own_columns: 4 },
    Tile { rows: 64, columns: 32, own_rows: 4, own_columns: 4 },
    Tile { rows: 64, columns: 64, own_rows: 8, own_columns: 4 },
    Tile { rows: 128, columns: 64, own_rows: 8, own_columns: 8 },
];

/// More columns than this meet decoded weights in tiles on a GPU; fewer are worked on four at a time.
const FEW_COLUMNS: usize = 8;

impl Tile {
    fn threads(&self) -> u32 {
        self.rows / self.own_rows * (self.columns / self.own_columns)
    }

    /// Bytes that a work group shares: 36 numbers for each row and column, and addresses. Integer dot
    /// products take less.
    fn shared_memory(&self) -> u32 {
        4 * 36 * (self.rows + self.columns) + 8 * self.columns
    }

    /// Work groups of a product of `rows` rows of weights with so many tiles of columns.
    fn groups(&self, column_tiles: usize, rows: usize) -> usize {
        rows.div_ceil(self.rows as usize).saturating_mul(column_tiles)
    }
}

/// How attention is cut.
#[derive(Clone, Debug)]
pub(crate) struct AttentionShape {
    /// Its shader is `KERNEL_FORMAT`.
    pub kernel: &'static str,
    /// What the shader is specialised by, but for the last two: whether elements of the query, and four of the cache, are
    /// loaded together.
    pub constants: Vec<u32>,
    /// Elements of the query that are loaded together where all lie so.
    pub together: u32,
    /// Heads of each work group.
    pub heads: u32,
    /// Cached rows of each work group.
    pub chunk: u32,
}

impl Tuning {
    pub(crate) fn new(
        class: Option<DeviceClass>,
        arithmetic: Option<Arithmetic>,
        capabilities: &Capabilities,
    ) -> Self {
        let own = if capabilities.software { DeviceClass::Software } else { DeviceClass::Gpu };
        // Asked for an arithmetic, it is a GPU's that is wanted.
        let class = class.unwrap_or(if arithmetic.is_some() { DeviceClass::Gpu } else { own });
        let subgroup = capabilities.subgroup;
        let matrix = capabilities.matrix.unwrap_or([16; 3]);
        let arithmetic = arithmetic.unwrap_or(match capabilities {
            Capabilities { matrix: Some(_), .. } => Arithmetic::CooperativeMatrices,
            Capabilities { fast_integer_dots: true, .. } => Arithmetic::IntegerDots,
            _ => Arithmetic::Floats,
        });
        match class {
            DeviceClass::Software => Tuning {
                class,
                subgroup,
                // Nothing of that is an instruction there.
                arithmetic: Arithmetic::Floats,
                matrix,
                row_threads: [32.max(subgroup); 2],
                macs_per_second: 1e9,
                // Other kernels would have to be compiled first, with less to gain.
                few_rows: &[],
                depth: 4096,
                chunk: 1024,
                groups: 2,
                product_groups: 2,
                shared_memory: capabilities.shared_memory,
            },
            DeviceClass::Gpu => Tuning {
                class,
                subgroup,
                arithmetic,
                matrix,
                row_threads: [256, 1024].map(|threads| capabilities.largest_group.min(threads)),
                // Less than nearly any of its kind does, as a driver may kill what takes seconds; too many submissions
                // cost little.
                macs_per_second: if capabilities.shares_memory { 2.5e10 } else { 1e11 },
                few_rows: &[FEW_COLUMNS, 64],
                // As below for tests.
                depth: if capabilities.software { 32 } else { 4096 },
                chunk: 128,
                groups: 256,
                // Where tests have work cut as for a GPU that is none, few: so that small cases meet every shape.
                product_groups: if capabilities.software { 3 } else { 256 },
                shared_memory: capabilities.shared_memory,
            },
        }
    }

    /// Invocations that work on a row together.
    pub(crate) fn row_threads(&self, capacity: &Capacity) -> u32 {
        self.row_threads[usize::from(capacity.rows == 1)]
    }

    /// The capacities that a program of `full` capacity is cut for, the smaller before those that hold what it holds. Whether
    /// it `has_outputs`, values with a row for each output.
    pub(crate) fn sizes(&self, full: &Capacity, has_outputs: bool) -> Vec<Capacity> {
        let few = self.few_rows.iter().copied().filter(|rows| *rows < full.rows);
        let depths = iter::successors(Some(self.depth), |depth| depth.checked_mul(4));
        let depths: Vec<usize> =
            depths.take_while(|depth| *depth < full.kv_len).chain([full.kv_len]).collect();
        let mut sizes = Vec::new();
        for rows in few.chain([full.rows]) {
            // Of a prompt often only the last row's logits are wanted, which are a token's product.
            let most = full.outputs.min(rows);
            for outputs in (most > 1 && has_outputs).then_some(1).into_iter().chain([most]) {
                let deep = depths.iter().filter(|depth| **depth >= rows);
                sizes.extend(deep.map(|&kv_len| Capacity { rows, outputs, kv_len }));
            }
        }
        // More outputs than rows are no step of a model, but may be asked for.
        sizes.push(*full);
        sizes.dedup();
        sizes
    }

    /// Whether blocks of a format are loaded eight bytes at a time, where they may be. A GPU has a price for what has to be
    /// put together from loads around it.
    pub(crate) fn loads_wide(&self, dtype: DType) -> bool {
        self.class == DeviceClass::Software || !dtype.is_quantized() || dtype.block_bytes().is_multiple_of(8)
    }

    /// Columns of activations that a product works on at once, of so many, with so many rows of weights in all.
    pub(crate) fn columns(&self, columns: usize, rows: usize) -> u32 {
        match columns {
            0..=1 => 1,
            2 => 2,
            3..=7 => 4,
            // Weights are decoded for as many as have registers, unless too many of those columns would be empty.
            _ if self.class == DeviceClass::Software => match columns.next_multiple_of(8) - columns {
                4.. if columns < 5 * 8 => 4,
                _ => 8,
            },
            _ if columns <= FEW_COLUMNS => 4,
            _ => {
                // Not more than half empty, and no narrow ones where there are many columns.
                let suits = |tile: &Tile| {
                    let width = tile.columns as usize;
                    width >= columns.min(32) && width < 2 * columns
                };
                self.tile(suits, |tile| tile.groups(columns.div_ceil(tile.columns as usize), rows)).columns
            }
        }
    }

    /// The largest tile of those that suit, if there are enough to fill the device; else the smallest.
    fn tile(&self, suits: impl Fn(&Tile) -> bool, groups: impl Fn(&Tile) -> usize) -> Tile {
        let fit =
            || TILES.into_iter().filter(|tile| tile.shared_memory() <= self.shared_memory && suits(tile));
        let full = fit().rev().find(|tile| groups(tile) >= self.product_groups as usize);
        full.or(fit().next()).unwrap_or(TILES[0])
    }

    /// For tiles of so many [`columns`](Self::columns), so many of them, with so many rows of `k` weights in all; `exact`
    /// where nothing may be rounded below f32.
    pub(crate) fn product(
        &self,
        columns: u32,
        column_tiles: usize,
        rows: usize,
        k: u32,
        exact: bool,
    ) -> ProductShape {
        if self.class == DeviceClass::Software {
            let lanes = rows as u32 / self.subgroup;
            // Loads of so many rows take turns; a single column leaves less to do between them.
            let most = if columns == 1 { 4 } else { 8 };
            let vectors = (lanes / (4 * self.product_groups)).clamp(1, most).next_power_of_two();
            return ProductShape {
                kernel: "lanes",
                constants: vec![self.subgroup, vectors, columns],
                together: 2,
                rows: vectors * self.subgroup,
                whole_subgroups: true,
            };
        }
        if columns as usize > FEW_COLUMNS {
            let tile = self.tile(|tile| tile.columns == columns, |tile| tile.groups(column_tiles, rows));
            return match self.arithmetic {
                Arithmetic::CooperativeMatrices if !exact && self.fits_matrices(&tile) => {
                    let [block_rows, block_columns, depth] = self.matrix;
                    let threads = self.matrix_subgroups(&tile) * self.subgroup;
                    ProductShape {
                        kernel: "matrix",
                        constants: vec![
                            threads,
                            self.subgroup,
                            tile.rows,
                            columns,
                            block_rows,
                            block_columns,
                            depth,
                        ],
                        together: 4,
                        rows: tile.rows,
                        whole_subgroups: true,
                    }
                }
                arithmetic => ProductShape {
                    kernel: if !exact && arithmetic == Arithmetic::IntegerDots { "dots" } else { "tiled" },
                    constants: vec![tile.threads(), tile.rows, columns, tile.own_rows, tile.own_columns],
                    together: 4,
                    rows: tile.rows,
                    whole_subgroups: false,
                },
            };
        }
        let subgroups = (128 / self.subgroup).clamp(1, 8);
        let lanes = self.lanes(k.div_ceil(32));
        let pack = self.subgroup / lanes;
        let fills = |rows_each: u32, split: u32| {
            let each = u64::from(subgroups / split * pack * rows_each);
            (rows as u64).saturating_mul(column_tiles as u64) / each >= u64::from(self.product_groups)
        };
        // Activations are registers: of four columns, with fewer rows.
        let most = if columns > 2 { 2 } else { 4 };
        let mut own_rows = most;
        while own_rows > 1 && !fills(own_rows, 1) {
            own_rows /= 2;
        }
        // As long as each lane has a unit.
        let mut split = 1;
        while split < subgroups && !fills(own_rows, split) && k / 32 >= 2 * split * lanes && pack == 1 {
            split *= 2;
        }
        ProductShape {
            kernel: "reduce",
            constants: vec![subgroups * self.subgroup, self.subgroup, columns, own_rows, split, lanes],
            together: 4,
            rows: subgroups / split * pack * own_rows,
            whole_subgroups: true,
        }
    }

    /// Lanes that run along rows of so many units together: the most of those that are seldom idle.
    fn lanes(&self, units: u32) -> u32 {
        let halves =
            || iter::successors(Some(self.subgroup), |lanes| Some(lanes / 2)).take_while(|lanes| *lanes > 0);
        let idle = |lanes: u32| units.next_multiple_of(lanes) - units;
        halves().find(|lanes| 8 * idle(*lanes) <= units).unwrap_or(1)
    }

    /// Subgroups that work on a tile with cooperative matrices: as many as have a block each.
    fn matrix_subgroups(&self, tile: &Tile) -> u32 {
        let [rows, columns, _] = self.matrix;
        (128 / self.subgroup).clamp(1, tile.rows / rows * (tile.columns / columns))
    }

    /// Whether a tile consists of whole matrices, and leaves room for a block of results of each subgroup.
    fn fits_matrices(&self, tile: &Tile) -> bool {
        let [rows, columns, _] = self.matrix;
        if !tile.rows.is_multiple_of(rows) || !tile.columns.is_multiple_of(columns) {
            return false;
        }
        let results = 4 * self.matrix_subgroups(tile) * rows * columns;
        // Five times 16 bytes of each row and column, and of each column its address and largest value.
        80 * (tile.rows + tile.columns) + 12 * tile.columns + results <= self.shared_memory
    }

    pub(crate) fn attention(
        &self,
        heads: u32,
        width: u32,
        latent: u32,
        capacity: &Capacity,
    ) -> AttentionShape {
        let shape = match self.class {
            DeviceClass::Software => None,
            DeviceClass::Gpu => self.attention_along_rows(heads, width, latent, capacity),
        };
        shape.unwrap_or_else(|| self.attention_across_rows(heads, latent, capacity))
    }

    /// With `attention.comp`: invocations have cached rows each.
    fn attention_across_rows(&self, heads: u32, latent: u32, capacity: &Capacity) -> AttentionShape {
        let (threads, vectors) = match self.class {
            // Subgroups that wait for none other, where sums fit.
            DeviceClass::Software => (latent.div_ceil(8).next_power_of_two().clamp(8, 64), 4),
            DeviceClass::Gpu => (128, 1),
        };
        let threads = threads.max(self.subgroup);
        let elements = latent.div_ceil(threads).next_multiple_of(4);
        // Sums are registers.
        let most = (64 / elements).clamp(1, 8);
        let heads_each = heads.next_power_of_two().min(1 << most.ilog2());
        AttentionShape {
            kernel: "attention",
            constants: vec![threads, self.subgroup, heads_each, vectors, elements],
            together: 2,
            heads: heads_each,
            chunk: self.attention_chunk(heads.div_ceil(heads_each), threads * vectors, capacity),
        }
    }

    /// With `attention_reduce.comp`: lanes run along cached rows, which have to fit their registers.
    fn attention_along_rows(
        &self,
        heads: u32,
        width: u32,
        latent: u32,
        capacity: &Capacity,
    ) -> Option<AttentionShape> {
        let subgroups = (128 / self.subgroup).clamp(1, 8);
        let fours = |elements: u32| elements.div_ceil(4 * self.subgroup);
        let (row_fours, latent_fours) = (fours(width), fours(latent));
        if row_fours > 20 {
            return None;
        }
        // So are the query and the sums, of each head.
        let most = (36 / (row_fours + latent_fours)).clamp(1, 8);
        let mut heads_each = heads.next_power_of_two().min(1 << most.ilog2());
        let shared = |heads: u32| heads * (16 * latent_fours * self.subgroup + 8 * subgroups);
        while heads_each > 1 && shared(heads_each) > self.shared_memory {
            heads_each /= 2;
        }
        let rows = 2;
        let shape = AttentionShape {
            kernel: "attention_reduce",
            constants: vec![
                subgroups * self.subgroup,
                self.subgroup,
                heads_each,
                rows,
                row_fours,
                latent_fours,
            ],
            together: 4,
            heads: heads_each,
            chunk: self.attention_chunk(heads.div_ceil(heads_each), subgroups * rows, capacity),
        };
        (shared(heads_each) <= self.shared_memory).then_some(shape)
    }

    /// Cached rows of a work group that has `tile` at once, where there are so many for each row of a step.
    fn attention_chunk(&self, groups_each: u32, tile: u32, capacity: &Capacity) -> u32 {
        let groups = (groups_each as usize).saturating_mul(capacity.rows);
        if groups >= self.groups as usize {
            return u32::MAX;
        }
        // At most 32 chunks, whose results have to be kept.
        let least = (capacity.kv_len as u64).div_ceil(32) as u32;
        self.chunk.max(least).next_multiple_of(tile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend_api::Step;

    fn tuning(class: DeviceClass, subgroup: u32, shared_memory: u32) -> Tuning {
        let capabilities = Capabilities { subgroup, shared_memory, ..Capabilities::default() };
        Tuning::new(Some(class), None, &capabilities)
    }

    #[test]
    fn tiles_fit_what_a_work_group_may_share() {
        for shared_memory in [16 << 10, 32 << 10, 48 << 10] {
            let tuning = tuning(DeviceClass::Gpu, 32, shared_memory);
            for columns in [9, 16, 17, 33, 64, 65, 512, 4096] {
                for rows in [1, 64, 576, 2048, 102_400] {
                    let width = tuning.columns(columns, rows);
                    let shape = tuning.product(width, columns.div_ceil(width as usize), rows, 2048, true);
                    let tile = TILES.into_iter().find(|t| (t.rows, t.columns) == (shape.rows, width));
                    let tile = tile.unwrap_or_else(|| panic!("{shape:?}"));
                    assert!(tile.shared_memory() <= shared_memory, "{shape:?}");
                    assert!(tile.threads() <= 128, "what every device can: {shape:?}");
                    assert!((width as usize) < 2 * columns.max(9), "{columns} columns: {shape:?}");
                }
            }
        }
    }

    #[test]
    fn matrices_fit_what_a_work_group_may_share() {
        let mut met = 0;
        for subgroup in [8, 16, 32, 64, 128] {
            for matrix in [[16, 16, 16], [8, 8, 8], [8, 8, 32], [16, 8, 16], [8, 16, 16]] {
                for shared_memory in [16 << 10, 30 << 10, 32 << 10, 48 << 10] {
                    let matrix = Some(matrix);
                    let all = Capabilities { subgroup, shared_memory, matrix, ..Capabilities::default() };
                    let tuning = Tuning::new(Some(DeviceClass::Gpu), None, &all);
                    for (columns, rows) in [(9, 64), (16, 65), (33, 130), (64, 2048), (512, 102_400)] {
                        let width = tuning.columns(columns, rows);
                        let tiles = columns.div_ceil(width as usize);
                        assert_ne!(tuning.product(width, tiles, rows, 2048, true).kernel, "matrix");
                        let shape = tuning.product(width, tiles, rows, 2048, false);
                        if shape.kernel != "matrix" {
                            continue;
                        }
                        met += 1;
                        let [threads, lanes, height, across, m, n, k] = shape.constants[..] else {
                            panic!("{shape:?}")
                        };
                        assert!(threads <= 128 && threads.is_multiple_of(lanes) && lanes == subgroup);
                        assert!(height.is_multiple_of(m) && across.is_multiple_of(n) && 32 % k == 0);
                        let shared = 80 * (height + across) + 12 * across + 4 * threads / lanes * m * n;
                        assert!(shared <= shared_memory, "{shape:?}: {shared} bytes");
                    }
                }
            }
        }
        assert!(met > 300, "{met}");
    }

    #[test]
    fn few_rows_share_subgroups_where_they_are_long() {
        for subgroup in [8, 16, 32, 64, 128] {
            let tuning = tuning(DeviceClass::Gpu, subgroup, 32 << 10);
            for (columns, rows, k) in
                [(1, 64, 7168), (1, 576, 2048), (2, 2048, 512), (4, 102_400, 2048), (1, 1, 32)]
            {
                let shape = tuning.product(columns, 1, rows, k, true);
                let [threads, whole, width, own_rows, split, lanes] = shape.constants[..] else {
                    panic!("{shape:?}")
                };
                assert_eq!((whole, width), (subgroup, columns));
                assert!(threads <= 128 && (threads / whole).is_multiple_of(split), "{shape:?}");
                assert!(whole.is_multiple_of(lanes) && (split == 1 || lanes == whole), "{shape:?}");
                assert_eq!(shape.rows, threads / whole / split * (whole / lanes) * own_rows);
                let idle = (k / 32).next_multiple_of(lanes) - k / 32;
                assert!(8 * idle <= k / 32, "idle lanes: {shape:?}");
                assert!(split == 1 || k / 32 >= split * lanes, "idle lanes: {shape:?}");
            }
        }
        let shape = tuning(DeviceClass::Gpu, 32, 32 << 10).product(1, 1, 64, 7168, true);
        assert_eq!(shape.constants, [128, 32, 1, 1, 4, 32]);
        let shape = tuning(DeviceClass::Gpu, 32, 32 << 10).product(1, 1, 102_400, 2048, true);
        assert_eq!(shape.constants, [128, 32, 1, 4, 1, 32]);
        // The absorbed products.
        let shape = tuning(DeviceClass::Gpu, 64, 32 << 10).product(1, 1, 16 * 512, 128, true);
        assert_eq!(shape.constants, [128, 64, 1, 1, 1, 4]);
    }

    #[test]
    fn attention_runs_along_rows_where_they_fit_registers() {
        let one = Capacity { rows: 1, outputs: 1, kv_len: 4096 };
        for subgroup in [8, 16, 32, 64, 128] {
            for shared_memory in [16 << 10, 32 << 10] {
                let tuning = tuning(DeviceClass::Gpu, subgroup, shared_memory);
                let shape = tuning.attention(16, 576, 512, &one);
                let [threads, lanes, heads, rows, row_fours, latent_fours] = shape.constants[..] else {
                    panic!("{shape:?}")
                };
                assert_eq!((shape.kernel, lanes, heads), ("attention_reduce", subgroup, shape.heads));
                assert!(4 * row_fours * lanes >= 576 && 4 * latent_fours * lanes >= 512, "{shape:?}");
                assert!(shape.chunk.is_multiple_of(threads / lanes * rows), "{shape:?}");
            }
        }
        let tuning = tuning(DeviceClass::Gpu, 32, 32 << 10);
        assert_eq!(tuning.attention(16, 576, 512, &one).heads, 4);
        assert_eq!(tuning.attention(16, 4160, 4096, &one).kernel, "attention");
    }

    /// Cases of conformance, cut as for a GPU, meet every shape.
    #[test]
    fn tests_meet_every_shape() {
        let all =
            Capabilities { subgroup: 8, shared_memory: 32 << 10, software: true, ..Capabilities::default() };
        let tuning = Tuning::new(Some(DeviceClass::Gpu), None, &all);
        let shape = |columns: usize, rows| {
            let width = tuning.columns(columns, rows);
            (tuning.product(width, columns.div_ceil(width as usize), rows, 256, true), width)
        };
        let few = [(1, 7), (1, 65), (1, 130), (2, 130), (4, 65)];
        let rows = few.map(|(columns, rows)| shape(columns, rows).0.constants[3]);
        assert_eq!(rows, [1, 2, 4, 4, 2]);
        let many = [(16, 65), (33, 33), (33, 65), (70, 65), (70, 130)];
        let met = many.map(|(columns, rows)| shape(columns, rows)).map(|(shape, width)| (shape.rows, width));
        assert_eq!(met, TILES.map(|tile| (tile.rows, tile.columns)));
        assert_eq!(tuning.product(1, 1, 5, 18_432, true).constants[4], 8, "the deep case shares rows");
    }
    #[test]
    fn each_step_has_a_form_that_holds_it() {
        let full = Capacity { rows: 512, outputs: 512, kv_len: 20_000 };
        let sizes = tuning(DeviceClass::Gpu, 32, 32 << 10).sizes(&full, true);
        let numbers = |size: &Capacity| (size.rows, size.outputs, size.kv_len);
        let deep = |(rows, outputs)| [4096, 16_384, 20_000].map(|kv_len| (rows, outputs, kv_len));
        let kinds = [(8, 1), (8, 8), (64, 1), (64, 64), (512, 1), (512, 512)];
        assert_eq!(sizes.iter().map(numbers).collect::<Vec<_>>(), kinds.map(deep).concat());
        let step = |rows, past, outputs| Step { rows, past, outputs };
        let of = |step: Step| sizes.iter().find(|size| size.holds(&step)).map(numbers);
        assert_eq!(of(step(5, 0, 1)), Some((8, 1, 4096)));
        assert_eq!(of(step(9, 4088, 9)), Some((64, 64, 16_384)));
        assert_eq!(of(step(1, 19_999, 0)), Some((8, 1, 20_000)));
        assert_eq!(of(full.full_step()), Some((512, 512, 20_000)));
        // More outputs than rows, as no model has.
        assert_eq!(of(step(3, 0, 400)), Some((512, 512, 4096)));
        let one = Capacity { rows: 1, outputs: 3, kv_len: 4096 };
        let software = tuning(DeviceClass::Software, 8, 32 << 10);
        assert_eq!(software.sizes(&one, true).last(), Some(&one));
        assert_eq!([true, false].map(|outputs| software.sizes(&full, outputs).len()), [6, 3]);
    }

    /// What `product_lanes.comp` takes for granted.
    #[test]
    fn software_takes_powers_of_two_at_once() {
        for subgroup in [8, 16, 64, 128] {
            let tuning = tuning(DeviceClass::Software, subgroup, 32 << 10);
            for columns in 1..80 {
                let width = tuning.columns(columns, 1);
                let tiles = columns.div_ceil(width as usize);
                assert!(width.is_power_of_two() && width <= 8, "{columns}: {width}");
                assert!(
                    tiles * width as usize <= columns + 4.max(columns / 5),
                    "{columns}: {tiles} of {width}"
                );
                for rows in [1, 7, 64, 576, 1040, 102_400] {
                    let shape = tuning.product(width, tiles, rows, 2048, true);
                    let [_, vectors, across] = shape.constants[..] else { panic!("{shape:?}") };
                    assert!(vectors.is_power_of_two() && vectors <= 8 && across == width, "{shape:?}");
                }
            }
        }
    }
}
