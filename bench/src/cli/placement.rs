//! The placement options as people type them, with llama.cpp's names where it has them.

use super::{Failure, devices::size};
use clap::{Args, ValueEnum};
use graph::{Absorb, Rates};
use model_deepseek::{
    PlacementOptions,
    placement::{Fit, GpuLayers, Override},
};
use std::{env, ffi::OsString, ops::Range, str::FromStr};

/// What goes where. As long as nothing is said, accelerators get all that fits.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Placement")]
pub struct PlacementArgs {
    /// Layers on accelerators, the last ones, with their caches; the output counts as one, the embedding is always on
    /// the host. A constraint for --fit, unless `auto` (or -1) leaves it to that. Also LLAMA_ARG_N_GPU_LAYERS
    /// [short: -ngl] [default: auto]
    #[arg(long, value_name = "N|all|auto", allow_hyphen_values = true)]
    pub n_gpu_layers: Option<LayerCount>,
    /// Tensors on a device: those in whose GGUF name the regular expression is found (repeatable, or with commas
    /// between; the first that matches counts; one that matches nothing is an error). Goes before all other options, in
    /// any order. Unlike in llama.cpp, the weights beside a cache (attn_k_b, attn_v_b) move no other node with them. Also
    /// LLAMA_ARG_OVERRIDE_TENSOR [short: -ot]
    #[arg(long, value_name = "REGEX=DEVICE", allow_hyphen_values = true)]
    pub override_tensor: Vec<OverrideArg>,
    /// The routed experts of all layers on the host. Unlike in llama.cpp, one row a token comes back, not one for each
    /// expert, and no weight is streamed for a long prompt. Also LLAMA_ARG_CPU_MOE [short: -cmoe]
    #[arg(long)]
    pub cpu_moe: bool,
    /// The routed experts of the first N layers on the host. Also LLAMA_ARG_N_CPU_MOE [short: -ncmoe]
    #[arg(long, value_name = "N")]
    pub n_cpu_moe: Option<usize>,
    /// The dense feed-forward networks of the first N layers on the host
    #[arg(long, value_name = "N")]
    pub n_cpu_ffn: Option<usize>,
    /// All caches on the host. Unlike in llama.cpp, attention and the products beside it go with them, and neither a
    /// cache nor a weight crosses in any step. Also LLAMA_ARG_NO_KV_OFFLOAD [short: -nkvo]
    #[arg(long)]
    pub no_kv_offload: bool,
    /// The caches of some layers on a device, such as `cpu=0-2` or `cpu=7` (repeatable); beats --no-kv-offload
    #[arg(long, value_name = "DEVICE=RANGE")]
    pub kv_layers_on: Vec<CacheLayers>,
    /// Where the products beside a cache (q_absorb, v_absorb) run [default: owner]
    #[arg(long, value_name = "WHERE")]
    pub absorb: Option<AbsorbArg>,
    /// A node that its device cannot run is an error, instead of running elsewhere; unless nothing but its neighbours
    /// places it, and no more bytes cross with it elsewhere
    #[arg(long)]
    pub strict: bool,
    /// `off` lets neighbours take the nodes of a cache, as other engines do: for measuring what that costs
    /// [default: on]
    #[arg(long, value_name = "on|off")]
    pub ownership_check: Option<Switch>,
    /// Whether what the options leave open is filled by what fits (repeatable): into an accelerator's free memory less
    /// a margin, or into so many bytes, such as `vulkan0=8GiB`: at most what the device has, with a notice if more than
    /// it has free; what a driver takes for itself, and 30 to 100 MiB of buffers for copies and partial results, come on
    /// top. CPU devices and the GPUs beside them share main memory. Works around what was said, and fails with the bytes needed where it
    /// cannot [default: on]
    #[arg(long, value_name = "on|off|DEVICE=BYTES")]
    pub fit: Vec<FitArg>,
}

/// `N`, `all`, or what says as much as nothing: `auto`, `-1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerCount(Option<GpuLayers>);

/// `REGEX=DEVICE`, or several with commas between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverrideArg(Vec<Override>);

/// `DEVICE=RANGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayers(Range<usize>, String);

/// `on`, `off` or `DEVICE=BYTES`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FitArg {
    /// Whether at all.
    Switch(bool),
    /// Into so many bytes of a device.
    Budget(String, u64),
}

/// `--absorb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AbsorbArg {
    /// At the owner of the cache: the fewest bytes cross
    Owner,
    /// With their layer: the owner reads fewer weights from its memory, more activations cross
    Layer,
    /// Where it takes less time for a token, by rates of bus and memory: measured (main memory's always), or what a null
    /// device was given (if nothing: a bus of 25 GB/s, and memory that takes no time)
    Auto,
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

impl FromStr for LayerCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(LayerCount(Some(GpuLayers::All))),
            "auto" | "-1" => Ok(LayerCount(None)),
            _ => match text.parse() {
                Ok(n) => Ok(LayerCount(Some(GpuLayers::Last(n)))),
                Err(_) => Err(format!("expected a number of layers, `all` or `auto`, found `{text}`")),
            },
        }
    }
}

impl FromStr for OverrideArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let part = |part: &str, what| match part.is_empty() {
            false => Ok(part.to_owned()),
            true => Err(format!("expected REGEX=DEVICE, found no {what}")),
        };
        // A comma ends an entry only after its device: patterns may have commas too.
        let mut overrides = Vec::new();
        let mut entry = String::new();
        for piece in text.split_inclusive(',') {
            entry.push_str(piece);
            let whole = entry.strip_suffix(',').unwrap_or(&entry);
            if let Some((pattern, device)) = whole.rsplit_once('=') {
                overrides.push(Override::new(part(pattern, "REGEX")?, part(device, "DEVICE")?));
                entry.clear();
            }
        }
        if !entry.is_empty() || overrides.is_empty() {
            return Err(format!("expected REGEX=DEVICE, such as `ffn_.*_exps=cpu`, found `{entry}`"));
        }
        Ok(OverrideArg(overrides))
    }
}

impl FromStr for CacheLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("expected DEVICE=FIRST-LAST or DEVICE=LAYER, such as `cpu=0-2`, found `{text}`");
        let (device, range) =
            text.rsplit_once('=').filter(|(device, _)| !device.is_empty()).ok_or_else(wrong)?;
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let (first, last) = (number(first)?, number(last)?);
        let end = last.checked_add(1).filter(|end| *end > first).ok_or_else(wrong)?;
        Ok(CacheLayers(first..end, device.to_owned()))
    }
}

impl FromStr for FitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => Ok(FitArg::Switch(true)),
            "off" => Ok(FitArg::Switch(false)),
            _ => match text.rsplit_once('=') {
                Some((device, bytes)) if !device.is_empty() => {
                    Ok(FitArg::Budget(device.to_owned(), size(bytes)?))
                }
                _ => Err(format!("expected on, off or DEVICE=BYTES, such as `vulkan0=8GiB`, found `{text}`")),
            },
        }
    }
}

impl PlacementArgs {
    /// These, and where they say nothing, what `base` says. Of lists, these come first in what counts.
    pub fn over(&self, base: &PlacementArgs) -> PlacementArgs {
        let (new, old) = (self.clone(), base.clone());
        PlacementArgs {
            n_gpu_layers: new.n_gpu_layers.or(old.n_gpu_layers),
            override_tensor: [new.override_tensor, old.override_tensor].concat(),
            cpu_moe: new.cpu_moe || old.cpu_moe,
            n_cpu_moe: new.n_cpu_moe.or(old.n_cpu_moe),
            n_cpu_ffn: new.n_cpu_ffn.or(old.n_cpu_ffn),
            no_kv_offload: new.no_kv_offload || old.no_kv_offload,
            kv_layers_on: [old.kv_layers_on, new.kv_layers_on].concat(),
            absorb: new.absorb.or(old.absorb),
            strict: new.strict || old.strict,
            ownership_check: new.ownership_check.or(old.ownership_check),
            fit: [old.fit, new.fit].concat(),
        }
    }

    /// What llama.cpp's environment variables say: a flag by being there.
    ///
    /// # Errors
    /// A value that the option would not take.
    pub fn from_env() -> Result<PlacementArgs, Failure> {
        Self::from_variables(|name| env::var_os(name))
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Result<PlacementArgs, Failure> {
        fn value<T: FromStr>(name: &str, text: Option<OsString>) -> Result<Option<T>, Failure>
        where
            T::Err: std::fmt::Display,
        {
            let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
            let parsed = text.to_string_lossy().parse();
            parsed.map(Some).map_err(|error| format!("environment variable {name}: {error}").into())
        }
        let [layers, overrides, experts] =
            ["LLAMA_ARG_N_GPU_LAYERS", "LLAMA_ARG_OVERRIDE_TENSOR", "LLAMA_ARG_N_CPU_MOE"];
        let mut override_tensor: Vec<OverrideArg> = value(overrides, get(overrides))?.into_iter().collect();
        for entry in override_tensor.iter_mut().flat_map(|OverrideArg(entries)| entries) {
            entry.option = overrides;
        }
        Ok(PlacementArgs {
            n_gpu_layers: value(layers, get(layers))?,
            override_tensor,
            cpu_moe: get("LLAMA_ARG_CPU_MOE").is_some(),
            n_cpu_moe: value(experts, get(experts))?,
            no_kv_offload: get("LLAMA_ARG_NO_KV_OFFLOAD").is_some(),
            ..PlacementArgs::default()
        })
    }

    /// As the library takes it. Asks for rates only where `--absorb auto` needs them.
    pub fn resolve(&self, rates: impl FnOnce() -> Rates) -> PlacementOptions {
        let args = self.clone();
        let mut fit = Fit::default();
        for arg in args.fit {
            match arg {
                FitArg::Switch(on) => fit.on = on,
                FitArg::Budget(device, bytes) => {
                    fit.on = true;
                    fit.budgets.push((device, bytes));
                }
            }
        }
        PlacementOptions {
            gpu_layers: args.n_gpu_layers.and_then(|LayerCount(layers)| layers),
            overrides: args.override_tensor.into_iter().flat_map(|OverrideArg(entries)| entries).collect(),
            cpu_moe: args.cpu_moe,
            cpu_moe_layers: args.n_cpu_moe.unwrap_or(0),
            cpu_ffn_layers: args.n_cpu_ffn.unwrap_or(0),
            host_caches: args.no_kv_offload,
            cache_layers: args
                .kv_layers_on
                .into_iter()
                .map(|CacheLayers(range, device)| (range, device))
                .collect(),
            absorb: match args.absorb {
                None | Some(AbsorbArg::Owner) => Absorb::Owner,
                Some(AbsorbArg::Layer) => Absorb::Layer,
                Some(AbsorbArg::Auto) => Absorb::Auto(rates()),
            },
            strict: args.strict,
            ownership_check: args.ownership_check != Some(Switch::Off),
            fit,
        }
    }
}

/// llama.cpp's short names, which have several letters after one dash, as clap knows them; with `=`, too. The word
/// after an option that takes any text is that text.
pub(super) fn long_names(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    const SHORT: [(&str, &str); 5] = [
        ("-ngl", "--n-gpu-layers"),
        ("-ot", "--override-tensor"),
        ("-cmoe", "--cpu-moe"),
        ("-ncmoe", "--n-cpu-moe"),
        ("-nkvo", "--no-kv-offload"),
    ];
    const TEXTS: [&str; 2] = ["--prompt", "--text"];
    let mut is_text = false;
    args.map(move |arg| {
        if std::mem::replace(&mut is_text, TEXTS.iter().any(|option| arg == *option)) {
            return arg;
        }
        let long = |(short, long): &(&str, &str)| {
            let rest = arg.to_str()?.strip_prefix(short)?;
            (rest.is_empty() || rest.starts_with('=')).then(|| OsString::from(format!("{long}{rest}")))
        };
        SHORT.iter().find_map(long).unwrap_or(arg)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        placement: PlacementArgs,
    }

    fn parse(line: &str) -> Result<PlacementArgs, String> {
        let words = std::iter::once("program").chain(line.split_whitespace()).map(OsString::from);
        Line::try_parse_from(long_names(words)).map(|line| line.placement).map_err(|error| error.to_string())
    }

    fn resolved(line: &str) -> PlacementOptions {
        let rates = || Rates { bus: 1.0, memory: vec![2.0] };
        parse(line).expect(line).resolve(rates)
    }

    #[test]
    fn long_and_short_names_are_the_same() {
        let long = "--n-gpu-layers 3 --override-tensor a=b=gpu --cpu-moe --n-cpu-moe 2 --no-kv-offload";
        let short = "-ngl 3 -ot a=b=gpu -cmoe -ncmoe 2 -nkvo";
        let options = resolved(long);
        assert_eq!(options, resolved(short));
        assert_eq!(options.gpu_layers, Some(GpuLayers::Last(3)));
        assert_eq!(options.overrides, [Override::new("a=b", "gpu")], "the last `=` separates");
        assert!(options.cpu_moe && options.host_caches);
        assert_eq!(options.cpu_moe_layers, 2);
        assert_eq!(options, resolved("-ngl=3 -ot=a=b=gpu -cmoe -ncmoe=2 -nkvo"));
    }

    #[test]
    fn text_is_not_an_option() {
        let words = |line: &str| -> Vec<String> {
            let words = line.split_whitespace().map(OsString::from);
            long_names(words).map(|word| word.into_string().expect("UTF-8")).collect()
        };
        assert_eq!(words("--prompt -ngl -ngl 3"), ["--prompt", "-ngl", "--n-gpu-layers", "3"]);
        assert_eq!(words("--text -ot=a=b -otx"), ["--text", "-ot=a=b", "-otx"]);
    }

    #[test]
    fn layers_are_said_alike_everywhere() {
        let cases = [
            ("auto", None),
            ("-1", None),
            ("all", Some(GpuLayers::All)),
            ("0", Some(GpuLayers::Last(0))),
            ("99", Some(GpuLayers::Last(99))),
        ];
        for (text, expected) in cases {
            assert_eq!(resolved(&format!("-ngl {text}")).gpu_layers, expected, "{text}");
            let variable = |name: &str| (name == "LLAMA_ARG_N_GPU_LAYERS").then(|| OsString::from(text));
            let environment = PlacementArgs::from_variables(variable).expect(text);
            let nothing = || Rates { bus: 1.0, memory: vec![] };
            assert_eq!(environment.resolve(nothing).gpu_layers, expected, "{text}");
            // What was typed goes first, also where it leaves the layers open.
            let typed = parse("-ngl auto").expect("a line").over(&environment);
            assert_eq!(typed.resolve(nothing).gpu_layers, None, "{text}");
        }
        for text in ["-2", "some", "1.5", "Auto"] {
            assert!(parse(&format!("-ngl {text}")).is_err(), "{text}");
            for name in ["LLAMA_ARG_N_GPU_LAYERS", "LLAMA_ARG_N_CPU_MOE", "LLAMA_ARG_OVERRIDE_TENSOR"] {
                let variable = |other: &str| (other == name).then(|| OsString::from(text));
                let error = PlacementArgs::from_variables(variable).expect_err(text).to_string();
                assert!(error.starts_with(&format!("environment variable {name}: ")), "{error}");
            }
        }
    }

    #[test]
    fn what_is_not_said_is_the_default() {
        assert_eq!(resolved(""), PlacementOptions::default());
    }

    #[test]
    fn everything_can_be_said() {
        let options = resolved(
            "--n-gpu-layers all --n-cpu-ffn 4 --kv-layers-on cpu=0-2 --kv-layers-on gpu=7 --absorb auto --strict \
             --ownership-check off --fit gpu=1.5GiB --fit off",
        );
        let expected = PlacementOptions {
            gpu_layers: Some(GpuLayers::All),
            cpu_ffn_layers: 4,
            cache_layers: vec![(0..3, "cpu".to_owned()), (7..8, "gpu".to_owned())],
            absorb: Absorb::Auto(Rates { bus: 1.0, memory: vec![2.0] }),
            strict: true,
            ownership_check: false,
            fit: Fit { on: false, budgets: vec![("gpu".to_owned(), 3 << 29)] },
            ..PlacementOptions::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn mistakes_are_told() {
        let cases = [
            ("--n-gpu-layers some", "a number of layers, `all` or `auto`"),
            ("-ngl -2", "found `-2`"),
            ("-ngl=x", "found `x`"),
            ("-nkvo=1", "--no-kv-offload"),
            ("-ot exps", "REGEX=DEVICE"),
            ("-ot =cpu", "found no REGEX"),
            ("-ot exps=", "found no DEVICE"),
            ("-ot a=cpu,b", "found `b`"),
            ("--kv-layers-on cpu", "DEVICE=FIRST-LAST"),
            ("--kv-layers-on cpu=3-2", "DEVICE=FIRST-LAST"),
            ("--kv-layers-on cpu=a", "DEVICE=FIRST-LAST"),
            ("--kv-layers-on =1", "DEVICE=FIRST-LAST"),
            ("--fit maybe", "on, off or DEVICE=BYTES"),
            ("--fit gpu=lots", "expected a size"),
            ("--absorb here", "--absorb"),
            ("--ownership-check no", "--ownership-check"),
        ];
        for (line, message) in cases {
            let error = parse(line).expect_err(line);
            assert!(error.contains(message), "{line}: {error}");
        }
    }

    #[test]
    fn the_environment_stands_behind_the_options() {
        let variables = |name: &str| {
            let value = match name {
                "LLAMA_ARG_N_GPU_LAYERS" => "all",
                "LLAMA_ARG_OVERRIDE_TENSOR" => r"blk\.\d{1,2}\.x=CPU,exps=cpu",
                "LLAMA_ARG_N_CPU_MOE" => "5",
                "LLAMA_ARG_CPU_MOE" | "LLAMA_ARG_NO_KV_OFFLOAD" => "",
                _ => return None,
            };
            Some(OsString::from(value))
        };
        let environment = PlacementArgs::from_variables(variables).expect("good values");
        assert!(environment.cpu_moe && environment.no_kv_offload, "by presence");
        let args = parse("-ngl 2 -ot norm=gpu").expect("a line").over(&environment);
        assert_eq!(args.n_gpu_layers, Some(LayerCount(Some(GpuLayers::Last(2)))));
        assert_eq!(args.n_cpu_moe, Some(5));
        let said = args.resolve(|| Rates { bus: 1.0, memory: vec![] });
        let entries: Vec<(&str, &str)> =
            said.overrides.iter().map(|entry| (entry.pattern.as_str(), entry.device.as_str())).collect();
        assert_eq!(
            entries,
            [("norm", "gpu"), (r"blk\.\d{1,2}\.x", "CPU"), ("exps", "cpu")],
            "what was typed comes first"
        );
        let options: Vec<&str> = said.overrides.iter().map(|entry| entry.option).collect();
        assert_eq!(options, ["override-tensor", "LLAMA_ARG_OVERRIDE_TENSOR", "LLAMA_ARG_OVERRIDE_TENSOR"]);
        let bad = |name: &str| (name == "LLAMA_ARG_N_GPU_LAYERS").then(|| OsString::from("many"));
        let error = PlacementArgs::from_variables(bad).expect_err("no number").to_string();
        assert!(error.contains("LLAMA_ARG_N_GPU_LAYERS") && error.contains("`many`"), "{error}");
    }
}
