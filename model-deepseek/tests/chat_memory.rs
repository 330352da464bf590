//! SECURITY.md's bound on the memory of chat templates, by counting on all threads. Alone in its file, because every
//! thread of the process is counted.

mod counting;

use counting::Measuring;
use model_deepseek::chat::{ChatTemplate, Message};
use serde_json::{Value, json};

/// Renders a template and answers how many bytes that took at the most, and what became of it.
fn render(alone: &Measuring, source: &str, messages: &[Message]) -> (usize, Result<usize, String>) {
    let (text, most) = alone.peak(|| {
        ChatTemplate::new(source, "<s>", "</s>")
            .and_then(|template| template.render(messages, false, &Value::Null))
            .map(|text| text.len())
            .map_err(|error| error.to_string())
    });
    (most, text)
}

/// Does `step` to `ns.x`, which begins as `start`, forty times, and then writes it out.
fn repeated(start: &str, step: &str) -> String {
    format!(
        "{{% set ns = namespace(x={start}) %}}{{% set other = namespace(x=ns.x) %}}\
         {{% for i in range(40) %}}{{% {step} %}}{{% endfor %}}{{{{ ns.x }}}}"
    )
}

#[test]
fn templates_take_bounded_memory() {
    let growing = [
        ("[1]", "set ns.x = ns.x + ns.x"),
        ("[1]", "set ns.x = ns.x * 2"),
        ("[1]", "set ns.x = [ns.x, ns.x]"),
        ("[1]", "set ns.x = (ns.x, ns.x)"),
        ("(1, 2)", "set ns.x = ns.x + ns.x"),
        ("(1, 2)", "set ns.x = ns.x * 2"),
        ("[1]", "set ns.x = {'a': ns.x, 'b': ns.x}"),
        ("[1]", "set ns.x = dict(a=ns.x, b=ns.x)"),
        ("[1]", "set ns.x = namespace(a=ns.x, b=ns.x)"),
        ("[1]", "set ns.x = [ns.x, ns.x][0:]"),
        ("[1]", "set ns.x = [ns.x, ns.x][::-1]"),
        ("[1]", "set ns.x = [ns.x, ns.x] | list"),
        ("[1]", "set ns.x = ns.x | chain(ns.x)"),
        ("[1]", "set ns.x = ns.x | chain(ns.x) | list"),
        ("[1]", "set ns.x = [ns.x, ns.x] | map('list') | list"),
        ("[1]", "set ns.x = [ns.x] | batch(9, ns.x) | list"),
        ("[1]", "set ns.x = [ns.x] | slice(9, ns.x) | list"),
        ("[1]", "set ns.x = ns.x | zip(ns.x) | list + [ns.x]"),
        ("[1]", "set ns.x = [ns.x, ns.x] | sum(start=[])"),
        ("[1]", "set ns.x = [ns.x, ns.x] | sort"),
        ("[1]", "set ns.x = {'a': ns.x, 'b': ns.x}.items() | list"),
        ("[1]", "set ns.x = {'a': ns.x, 'b': ns.x}.values()"),
        ("[1]", "set ns.x = ['', ''] | map('default', ns.x, true) | list"),
        ("'12345678'", "set ns.x = ns.x ~ ns.x"),
        ("'12345678'", "set ns.x = ns.x + ns.x"),
        ("'12345678'", "set ns.x = ns.x * 2"),
        ("'12345678'", "set ns.x = ns.x * 1000000"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] | join(ns.x)"),
        ("'12345678'", "set ns.x = ns.x.join([ns.x, ns.x])"),
        ("'12345678'", "set ns.x = ns.x | replace('', ns.x)"),
        ("'12345678'", "set ns.x = ns.x.replace('', ns.x)"),
        ("'12345678'", "set ns.x = '%s%s' | format(ns.x, ns.x)"),
        ("'12345678'", "set ns.x = '{0}{0}{0}'.format(ns.x)"),
        ("'12345678'", "set ns.x = ns.x ~ '{:>99999999}'.format(ns.x)"),
        ("'12345678'", "set ns.x = ns.x ~ '{:>9999}{:>9999}{:>9999}'.format(1, 2, 3) * 9"),
        ("'12345678'", "set ns.x = ns.x ~ '%999999999d' | format(1)"),
        ("'12345678'", "set ns.x = ns.x ~ '{:.999999999f}'.format(1.5)"),
        ("'12345678'", "set ns.x = ns.x | indent(99999999, true)"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] | tojson"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] | tojson(indent=ns.x)"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] | tojson(separators=(ns.x, ns.x))"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] | string"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] | pprint"),
        ("'12345678'", "set ns.x = [ns.x, ns.x] ~ ''"),
        ("'12345678'", "set ns.x = (ns.x | list | string)"),
        ("'12345678'", "set ns.x = (ns.x.split('') | string)"),
        ("'12345678'", "set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y"),
        ("'12345678'", "filter replace('', ns.x) %}{{ ns.x }}{% endfilter %}{% set ns.x = ns.x ~ ns.x"),
        ("'\\u0001\\u0001'", "set ns.x = [ns.x, ns.x] | string"),
        ("'<<<<'", "autoescape true %}{% set ns.x = ns.x | escape ~ ns.x %}{% endautoescape"),
        ("'x' * 600000", "set ns.x = ns.x.split('')"),
        ("'x' * 600000", "set ns.x = ns.x | list"),
        ("range(100000)", "set ns.x = ns.x | list"),
        // cycles
        ("[1]", "set ns.x = ns"),
        ("[1]", "set ns.x = [ns]"),
        ("[1]", "set ns.x = {'a': other}"),
        ("[1]", "set ns.x = other %}{% set other.x = ns"),
        ("[1]", "set ns.x = namespace(a=ns)"),
        ("[1]", "set ns.x = [ns.x, loop]"),
        ("[1]", "set ns.x = [loop, loop] | map('attr', 'previtem') | list + [ns.x, ns.x]"),
        // many small ones
        ("[1]", "set ns.x = ns.x + range(999) | batch(1) | list"),
        ("[1]", "set ns.x = ns.x + range(999) | map('string') | list"),
    ];
    // Large values of each kind, near to what is allowed.
    let large = [
        "'é' * 250000",
        "'\\u0001' * 500000",
        "['x' * 1000] * 900",
        "[['\\u0001<' * 50] * 20] * 300",
        "range(15000) | list",
        "range(7000) | batch(1) | list",
        "dict(a=['x' * 1000] * 500, b=[1, 2.5, none] * 1000)",
        "(1, 'x') * 8000",
        "('x' * 7000).split('')",
    ];
    // What may turn a value into a larger one: text, lists, comparisons.
    let uses = [
        "{{ ns.x }}",
        "{{ ns }}",
        "{{ ns.x ~ '' }}",
        "{{ ns.x | string | length }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | tojson(indent=64) | length }}",
        "{{ ns.x | pprint | length }}",
        "{{ ns.x | join(',') }}",
        "{{ ', '.join(ns.x) }}",
        "{{ '{} {}'.format(ns.x, ns.x) }}",
        "{{ '%s %s' | format(ns.x, ns.x) }}",
        "{{ ns.x | list | length }}",
        "{{ ns.x + ns.x + ns.x | length }}",
        "{{ ns.x | upper | length }}",
        "{{ ns.x in 'text' }}",
        "{{ ns.x == ns.x[0:] }}",
        "{{ ns.x | unique | list | length }}",
        "{{ ns.x | dictsort }}",
        "{{ {ns.x: ns.x} }}",
        "{{ raise_exception(ns.x ~ '') }}",
        "{{ nothing[ns.x ~ ''].nothing.nothing }}",
        "{{ strftime_now(ns.x ~ '') }}",
        "{% for a in ns.x %}{% for b in ns.x %}{{ b }}{% endfor %}{% endfor %}",
        "{% set a, b, c = ns.x %}",
        "{% macro m(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call m(ns.x) %}{{ ns.x }}{% endcall %}",
        "{% for a in ns.x recursive %}{{ loop(ns.x) }}{% endfor %}",
        "{% block b %}{{ ns.x }}{{ self.b() }}{% endblock %}",
    ];
    // The engine, threads and the like take theirs once.
    let alone = Measuring::alone();
    render(&alone, "{{ 1 }}", &[]).1.unwrap();
    let few = [Message::new("user", "hi")];
    let many: Vec<_> = (0..40).map(|turn| Message::new("user", "é\u{1}<".repeat(turn * 64))).collect();
    let mut worst = (0, String::new());
    let mut within = |source: String, messages: &[Message]| {
        let (most, text) = render(&alone, &source, messages);
        let bound = (64 << 20) + messages.len() * (64 << 10) + 64 * json!(messages).to_string().len();
        assert!(most < bound, "{source}: {most} bytes, {text:?}");
        worst = worst.clone().max((most, source));
        text
    };
    let limits = ["out of fuel", "larger one", "nested at most", "by itself", "used as a value"];
    // Views of a namespace, which show what it is set to after they were measured.
    let views = [
        "set ns = namespace(x=1) %}{% set ns.x = ns | chain({}) %}{{ ns.x",
        "set ns = namespace(x=1) %}{% set o = namespace(x=1) %}{% set ns.x = o.values() %}{% set o.x = ns.values() \
         %}{{ ns.x == o.x",
        "set ns = namespace(x=1) %}{% set ns.x = ns | items %}{{ ns.x",
        "set ns = namespace(x=1) %}{% set n = ns %}{% set ns.x = n.items() %}{{ ns.x",
        "set ns = namespace(x=1) %}{% set f = namespace %}{% set ns.x = f(y=1).values() %}{{ ns.x",
        "macro m(n) %}{{ n.values() }}{% endmacro %}{{ m(namespace(x=1))",
        "set o = namespace(a='') %}{% set l = [o.values()] * 5000 %}{% set o.a = 'x' * 400000 %}{{ l | tojson | length",
    ];
    for view in views {
        let error = within(format!("{{% {view} }}}}"), &few).unwrap_err();
        assert!(error.contains("used as a value"), "{view}: {error}");
    }
    for (start, step) in growing {
        for messages in [&few[..], &many] {
            let error = within(repeated(start, step), messages).unwrap_err();
            assert!(limits.iter().any(|limit| error.contains(limit)), "{start}, {step}: {error}");
        }
    }
    for value in large {
        assert!(within(format!("{{% set x = {value} %}}"), &few).is_ok(), "{value} is not allowed");
        for last in uses {
            for messages in [&few[..], &many] {
                let _ =
                    within(format!("{{% set ns = namespace() %}}{{% set ns.x = {value} %}}{last}"), messages);
            }
        }
    }
    println!("at most {} bytes: {}", worst.0, worst.1);
}
