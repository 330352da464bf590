//! Random models of any shape, and their logits in f64 by another way than the crate's: attention with keys and
//! values expanded for each head, experts one by one, every sum as it is written in the papers.

use backend_api::{DType, GgmlType, format};
use model_deepseek::source::{
    Checkpoint,
    gguf_writer::{GgufWriter, NewValue},
};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// A shape. The default has everything: low-rank queries, YaRN, groups, bias, shared experts.
#[derive(Clone, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub vocabulary: usize,
    pub layers: usize,
    pub dense: usize,
    pub d: usize,
    pub heads: usize,
    pub q_lora: usize,
    pub kv_lora: usize,
    pub nope: usize,
    pub rope: usize,
    pub value: usize,
    pub width: usize,
    pub experts: usize,
    pub used: usize,
    pub shared: usize,
    pub expert_width: usize,
    pub groups: usize,
    pub groups_used: usize,
    pub sigmoid: bool,
    pub bias: bool,
    pub renormalise: bool,
    pub scale: f32,
    /// `(factor, original context, multiplier)`.
    pub yarn: Option<(f32, u32, f32)>,
    pub tied: bool,
    /// `attn_kv_b` instead of the split pair.
    pub legacy: bool,
    /// `ffn_gate_up_exps` instead of two tensors.
    pub fused: bool,
    /// Format of the matrices.
    pub dtype: DType,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            name: "everything",
            vocabulary: 96,
            layers: 3,
            dense: 1,
            d: 64,
            heads: 3,
            q_lora: 32,
            kv_lora: 32,
            nope: 16,
            rope: 8,
            value: 24,
            width: 96,
            experts: 16,
            used: 3,
            shared: 2,
            expert_width: 32,
            groups: 4,
            groups_used: 2,
            sigmoid: true,
            bias: true,
            renormalise: true,
            scale: 2.5,
            yarn: Some((40.0, 16, 0.1)),
            tied: false,
            legacy: false,
            fused: false,
            dtype: DType::F16,
        }
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub fn ggml_type(dtype: DType) -> GgmlType {
    match dtype {
        DType::F32 => GgmlType(0),
        DType::F16 => GgmlType(1),
        DType::Q4_0 => GgmlType(2),
        DType::Q8_0 => GgmlType(8),
        other => panic!("tests write no {other}"),
    }
}

/// A GGUF file in memory, tensor by tensor.
#[derive(Default)]
pub struct File {
    pub writer: GgufWriter,
    data: BTreeMap<String, Vec<u8>>,
}

impl File {
    pub fn key(&mut self, key: &str, value: impl Into<NewValue>) {
        self.writer.key(key, value).unwrap();
    }

    pub fn tensor(&mut self, name: &str, dtype: DType, shape: &[usize], values: &[f32]) {
        let inner = shape[shape.len() - 1];
        let mut bytes = vec![0; dtype.row_bytes(inner) * (values.len() / inner)];
        for (row, out) in values.chunks(inner).zip(bytes.chunks_mut(dtype.row_bytes(inner))) {
            format::encode(dtype, row, out);
        }
        self.writer.tensor(name, ggml_type(dtype), shape).unwrap();
        self.data.insert(name.to_owned(), bytes);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.writer.write_to(&mut out, |tensor, out| out.write_all(&self.data[&tensor.name])).unwrap();
        out
    }

    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::from_bytes(Path::new("random.gguf"), Arc::new(self.bytes())).unwrap()
    }
}

impl Shape {
    /// The keys, as llama.cpp's converter writes them.
    pub fn keys(&self) -> File {
        let mut file = File::default();
        let mut set = |key: &str, value: NewValue| file.key(&format!("deepseek2.{key}"), value);
        let number = |n: usize| NewValue::from(n as u32);
        set("vocab_size", number(self.vocabulary));
        set("context_length", number(256));
        set("embedding_length", number(self.d));
        set("block_count", number(self.layers));
        set("leading_dense_block_count", number(self.dense));
        set("feed_forward_length", number(self.width));
        set("attention.head_count", number(self.heads));
        set("attention.layer_norm_rms_epsilon", NewValue::from(1e-5f32));
        set("attention.kv_lora_rank", number(self.kv_lora));
        if self.q_lora > 0 {
            set("attention.q_lora_rank", number(self.q_lora));
        }
        set("rope.dimension_count", number(self.rope));
        let expanded = (self.nope + self.rope, self.value);
        if self.legacy {
            set("attention.key_length", number(expanded.0));
            set("attention.value_length", number(expanded.1));
        } else {
            set("attention.key_length_mla", number(expanded.0));
            set("attention.value_length_mla", number(expanded.1));
        }
        if let Some((factor, original, multiplier)) = self.yarn {
            set("rope.scaling.type", "yarn".into());
            set("rope.scaling.factor", factor.into());
            set("rope.scaling.original_context_length", original.into());
            set("rope.scaling.yarn_log_multiplier", multiplier.into());
        }
        if self.experts > 0 {
            set("expert_count", number(self.experts));
            set("expert_used_count", number(self.used));
            set("expert_shared_count", number(self.shared));
            set("expert_feed_forward_length", number(self.expert_width));
            set("expert_weights_scale", self.scale.into());
            set("expert_weights_norm", self.renormalise.into());
            set("expert_gating_func", number(1 + usize::from(self.sigmoid)));
            set("expert_group_count", number(self.groups));
            set("expert_group_used_count", number(self.groups_used));
        }
        file.key("general.architecture", "deepseek2");
        file
    }

    /// Random weights whose activations neither vanish nor explode.
    pub fn file(&self) -> File {
        let mut file = self.keys();
        let mut random = Random(self.name.bytes().map(u64::from).sum());
        let mut draw = |n: usize, scale: f32| (0..n).map(|_| random.next() * scale).collect::<Vec<f32>>();
        let mut matrix = |file: &mut File, name: &str, shape: &[usize]| {
            let inner = shape[shape.len() - 1];
            let values = draw(shape.iter().product(), 1.7 / (inner as f32).sqrt());
            // The router is never quantised.
            let dtype = if name.contains("ffn_gate_inp") { DType::F32 } else { self.dtype };
            // Rows that are no whole blocks stay F16, as a quantizer leaves them.
            let dtype = if inner.is_multiple_of(dtype.block_len()) { dtype } else { DType::F16 };
            file.tensor(name, dtype, shape, &values);
        };
        matrix(&mut file, "token_embd.weight", &[self.vocabulary, self.d]);
        if !self.tied {
            matrix(&mut file, "output.weight", &[self.vocabulary, self.d]);
        }
        for layer in 0..self.layers {
            let mut add =
                |part: &str, shape: &[usize]| matrix(&mut file, &format!("blk.{layer}.{part}"), shape);
            let queries = self.heads * (self.nope + self.rope);
            if self.q_lora > 0 {
                add("attn_q_a.weight", &[self.q_lora, self.d]);
                add("attn_q_b.weight", &[queries, self.q_lora]);
            } else {
                add("attn_q.weight", &[queries, self.d]);
            }
            add("attn_kv_a_mqa.weight", &[self.kv_lora + self.rope, self.d]);
            if self.legacy {
                add("attn_kv_b.weight", &[self.heads * (self.nope + self.value), self.kv_lora]);
            } else {
                add("attn_k_b.weight", &[self.heads, self.kv_lora, self.nope]);
                add("attn_v_b.weight", &[self.heads, self.value, self.kv_lora]);
            }
            add("attn_output.weight", &[self.d, self.heads * self.value]);
            let mut swiglu = |kind: &str, width: usize| {
                add(&format!("ffn_gate{kind}.weight"), &[width, self.d]);
                add(&format!("ffn_up{kind}.weight"), &[width, self.d]);
                add(&format!("ffn_down{kind}.weight"), &[self.d, width]);
            };
            if layer < self.dense {
                swiglu("", self.width);
                continue;
            }
            if self.shared > 0 {
                swiglu("_shexp", self.shared * self.expert_width);
            }
            add("ffn_gate_inp.weight", &[self.experts, self.d]);
            if self.fused {
                add("ffn_gate_up_exps.weight", &[self.experts, 2 * self.expert_width, self.d]);
            } else {
                add("ffn_gate_exps.weight", &[self.experts, self.expert_width, self.d]);
                add("ffn_up_exps.weight", &[self.experts, self.expert_width, self.d]);
            }
            add("ffn_down_exps.weight", &[self.experts, self.d, self.expert_width]);
        }
        let mut random = Random(99);
        let mut vector = |file: &mut File, name: &str, n: usize, centre: f32| {
            let values: Vec<f32> = (0..n).map(|_| centre + 0.2 * random.next()).collect();
            file.tensor(name, DType::F32, &[n], &values);
        };
        vector(&mut file, "output_norm.weight", self.d, 1.0);
        for layer in 0..self.layers {
            let mut add = |part: &str, n: usize, centre: f32| {
                vector(&mut file, &format!("blk.{layer}.{part}"), n, centre);
            };
            add("attn_norm.weight", self.d, 1.0);
            add("ffn_norm.weight", self.d, 1.0);
            add("attn_kv_a_norm.weight", self.kv_lora, 1.0);
            if self.q_lora > 0 {
                add("attn_q_a_norm.weight", self.q_lora, 1.0);
            }
            if self.bias && layer >= self.dense {
                add("exp_probs_b.bias", self.experts, 0.0);
            }
        }
        file
    }

    /// Logits of all tokens.
    pub fn logits(&self, checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
        let reference = Reference { shape: self, checkpoint };
        reference.logits(tokens).into_iter().flatten().map(|x| x as f32).collect()
    }
}

type Row = Vec<f64>;

struct Reference<'a> {
    shape: &'a Shape,
    checkpoint: &'a Checkpoint,
}

impl Reference<'_> {
    /// All rows of a tensor, decoded; outer extents flattened.
    fn rows(&self, name: &str) -> Vec<Row> {
        let info = self.checkpoint.required(name).unwrap();
        let (dtype, inner) = (info.runs().unwrap(), *info.shape.last().unwrap());
        let bytes = self.checkpoint.load(name).unwrap();
        let decode = |row: &[u8]| {
            let mut values = vec![0.0; inner];
            format::decode(dtype, row, &mut values);
            values.into_iter().map(f64::from).collect()
        };
        bytes.as_slice().chunks(dtype.row_bytes(inner)).map(decode).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.checkpoint.tensor(name).is_some()
    }

    fn norm(&self, x: &[f64], name: &str) -> Row {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let weight = &self.rows(name)[0];
        x.iter().zip(weight).map(|(v, w)| v / (mean + f64::from(1e-5f32)).sqrt() * w).collect()
    }

    fn swiglu(&self, layer: usize, kind: &str, x: &[f64]) -> Row {
        let w = |part: &str| self.rows(&format!("blk.{layer}.ffn_{part}{kind}.weight"));
        times(&w("down"), &gated(&times(&w("gate"), x), &times(&w("up"), x)))
    }

    /// YaRN as its paper has it: how many turns does a pair make within the original context?
    fn rotate(&self, x: &[f64], position: usize) -> Row {
        let dims = x.len() as f64;
        let mut out = Vec::new();
        for (pair, values) in x.chunks(2).enumerate() {
            let mut theta = 10000f64.powf(-2.0 * pair as f64 / dims);
            if let Some((factor, original, _)) = self.shape.yarn {
                let pair_of = |turns: f64| {
                    let angle = f64::from(original) / turns / std::f64::consts::TAU;
                    dims / 2.0 * angle.ln() / 10000f64.ln()
                };
                let (low, high) = (pair_of(32.0).floor().max(0.0), pair_of(1.0).ceil().min(dims - 1.0));
                let slow = ((pair as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                theta *= 1.0 - slow + slow / f64::from(factor);
            }
            let (sin, cos) = (position as f64 * theta).sin_cos();
            out.extend([values[0] * cos - values[1] * sin, values[0] * sin + values[1] * cos]);
        }
        out
    }

    fn attention(&self, layer: usize, xs: &[Row]) -> Vec<Row> {
        let s = self.shape;
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let key = s.nope + s.rope;
        let mut scale = 1.0 / (key as f64).sqrt();
        if let Some((factor, _, multiplier)) = s.yarn {
            scale *= (1.0 + f64::from(multiplier) * f64::from(factor).ln()).powi(2);
        }
        // A head's key and value rows, whichever way the file has them.
        let (mut key_rows, mut value_rows) = (Vec::new(), Vec::new());
        if s.legacy {
            for head in self.rows(&name("attn_kv_b")).chunks(s.nope + s.value) {
                key_rows.push(head[..s.nope].to_vec());
                value_rows.push(head[s.nope..].to_vec());
            }
        } else {
            for head in self.rows(&name("attn_k_b")).chunks(s.kv_lora) {
                key_rows.push((0..s.nope).map(|i| head.iter().map(|row| row[i]).collect()).collect());
            }
            value_rows = self.rows(&name("attn_v_b")).chunks(s.value).map(<[Row]>::to_vec).collect();
        }
        let kv_a = self.rows(&name("attn_kv_a_mqa"));
        let output = self.rows(&name("attn_output"));
        let mut past: Vec<Vec<(Row, Row)>> = Vec::new();
        let mut out = Vec::new();
        for (position, x) in xs.iter().enumerate() {
            let q = if s.q_lora > 0 {
                let latent = self.norm(&times(&self.rows(&name("attn_q_a")), x), &name("attn_q_a_norm"));
                times(&self.rows(&name("attn_q_b")), &latent)
            } else {
                times(&self.rows(&name("attn_q")), x)
            };
            let kv = times(&kv_a, x);
            let latent = self.norm(&kv[..s.kv_lora], &name("attn_kv_a_norm"));
            let k_rope = self.rotate(&kv[s.kv_lora..], position);
            past.push(
                (0..s.heads)
                    .map(|h| {
                        let k = [times(&key_rows[h], &latent), k_rope.clone()].concat();
                        (k, times(&value_rows[h], &latent))
                    })
                    .collect(),
            );
            let mut values = Vec::new();
            for h in 0..s.heads {
                let q = &q[h * key..(h + 1) * key];
                let q = [q[..s.nope].to_vec(), self.rotate(&q[s.nope..], position)].concat();
                let scores: Row = past.iter().map(|heads| scale * dot(&q, &heads[h].0)).collect();
                let weights = softmax(&scores);
                values.extend(
                    (0..s.value)
                        .map(|i| weights.iter().zip(&past).map(|(w, heads)| w * heads[h].1[i]).sum::<f64>()),
                );
            }
            out.push(times(&output, &values));
        }
        out
    }

    fn experts(&self, layer: usize, x: &[f64]) -> Row {
        let s = self.shape;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let scores = times(&self.rows(&name("ffn_gate_inp.weight")), x);
        let p = if s.sigmoid {
            scores.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect()
        } else {
            softmax(&scores)
        };
        let mut choice = p.clone();
        if self.has(&name("exp_probs_b.bias")) {
            choice.iter_mut().zip(&self.rows(&name("exp_probs_b.bias"))[0]).for_each(|(c, b)| *c += b);
        }
        let per_group = s.experts / s.groups;
        if s.groups > 1 {
            let two_best: Row =
                choice.chunks(per_group).map(|g| best(g, 2).iter().map(|i| g[*i]).sum()).collect();
            let kept = best(&two_best, s.groups_used);
            for (expert, choice) in choice.iter_mut().enumerate() {
                if !kept.contains(&(expert / per_group)) {
                    *choice = f64::NEG_INFINITY;
                }
            }
        }
        let chosen = best(&choice, s.used);
        let sum: f64 = chosen.iter().map(|e| p[*e]).sum();
        let mut out = if s.shared > 0 { self.swiglu(layer, "_shexp", x) } else { vec![0.0; s.d] };
        let (gate, up) = if s.fused {
            let both = self.rows(&name("ffn_gate_up_exps.weight"));
            let half = |second: usize| {
                both.chunks(s.expert_width).skip(second).step_by(2).flatten().cloned().collect::<Vec<Row>>()
            };
            (half(0), half(1))
        } else {
            (self.rows(&name("ffn_gate_exps.weight")), self.rows(&name("ffn_up_exps.weight")))
        };
        let down = self.rows(&name("ffn_down_exps.weight"));
        for e in chosen {
            let weight = p[e] / if s.renormalise { sum } else { 1.0 } * f64::from(s.scale);
            let rows = e * s.expert_width..(e + 1) * s.expert_width;
            let hidden = gated(&times(&gate[rows.clone()], x), &times(&up[rows], x));
            let y = times(&down[e * s.d..(e + 1) * s.d], &hidden);
            out.iter_mut().zip(y).for_each(|(o, y)| *o += weight * y);
        }
        out
    }

    fn logits(&self, tokens: &[u32]) -> Vec<Row> {
        let embedding = self.rows("token_embd.weight");
        let mut xs: Vec<Row> = tokens.iter().map(|t| embedding[*t as usize].clone()).collect();
        for layer in 0..self.shape.layers {
            let norm = |xs: &[Row], part: &str| -> Vec<Row> {
                xs.iter().map(|x| self.norm(x, &format!("blk.{layer}.{part}.weight"))).collect()
            };
            let ys = self.attention(layer, &norm(&xs, "attn_norm"));
            add_to(&mut xs, &ys);
            let ys: Vec<Row> = norm(&xs, "ffn_norm")
                .iter()
                .map(|x| {
                    if layer < self.shape.dense { self.swiglu(layer, "", x) } else { self.experts(layer, x) }
                })
                .collect();
            add_to(&mut xs, &ys);
        }
        let head = if self.shape.tied { embedding } else { self.rows("output.weight") };
        xs.iter().map(|x| times(&head, &self.norm(x, "output_norm.weight"))).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(w: &[Row], x: &[f64]) -> Row {
    w.iter().map(|row| dot(row, x)).collect()
}

fn gated(gate: &[f64], up: &[f64]) -> Row {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

fn softmax(x: &[f64]) -> Row {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| (v - largest).exp()).sum();
    x.iter().map(|v| (v - largest).exp() / sum).collect()
}

/// Indices of the `n` largest, the largest first.
fn best(x: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].total_cmp(&x[*a]));
    order.truncate(n);
    order
}

fn add_to(xs: &mut [Row], ys: &[Row]) {
    for (x, y) in xs.iter_mut().zip(ys) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}
