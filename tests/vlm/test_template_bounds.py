"""Chat templates that are meant to do harm, and those of published models, which render as before."""

import inspect
import json
import subprocess
import sys

import jinja2
import pytest
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.filters import FILTERS as OF_JINJA
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

import vlm  # noqa: F401 - bounds the templates of transformers
from tests.tiny import tiny
from vlm.chat_templates import CHATML, FLATTEN, naming_template
from vlm.errors import UserError
from vlm.template_bounds import FILTERS, STRING_METHODS, BoundedEnvironment
from vlm.template_budget import CHARACTERS, STEPS, TemplateBoundsError

LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "items left out": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a loop in itself": (
        "{% for a in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}"
    ),
    "a macro in itself": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a block in itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "filters in a loop": "{% for a in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "a generator in a loop": "{% for a in range(99999) %}{{ range(99999)|select('odd')|first }}"
    "{% for b in range(99999)|map('int') %}{% endfor %}{% endfor %}",
    "sorting in a loop": "{% set l = range(99999)|list %}{% for a in l %}{{ (l|sort)[0] }}{% endfor %}",
    "slices in a loop": "{% set l = range(99999)|list %}{% for a in l %}{{ l[1:][0] }}{% endfor %}",
    "searching in a loop": (
        "{% set l = range(99999)|list %}{% for a in l %}{{ -1 in l }}{{ l.index(99998) }}{% endfor %}"
    ),
    "generation in a loop": "{% for a in range(99999) %}{% generation %}{{ 'x' * 400 }}{% endgeneration %}{% endfor %}",
}
GROWTH = {
    "a literal text": "{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}",
    "a text many times": "{{ 'x' * 10**9 }}",
    "many times a text": "{{ 10**9 * 'x' }}",
    "a list many times": "{{ ([1] * 10**9)|length }}",
    "doubling by +": "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by a block": (
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set s %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = s %}{% endfor %}"
    ),
    "doubling by replace": (
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}"
    ),
    "doubling by the filter": (
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s|replace('x', 'xx') %}{% endfor %}"
    ),
    "doubling a list": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "lists of the same lists": (
        "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}"
    ),
    "namespaces of namespaces": (
        "{% set n = namespace(s=1) %}{% for i in range(40) %}{% set n.s = namespace(a=n.s, b=n.s) %}{% endfor %}"
        "{{ n.s }}"
    ),
    "equal lists of lists": (
        "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}"
        "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.s == n.t }}"
    ),
    "the same, by a test": (
        "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}"
        "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.s is eq(n.t) }}"
    ),
    "the same, joined": (
        "{% set n = namespace(s=['x']) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s|join }}"
    ),
    "the same, as JSON": (
        "{% set n = namespace(s=['x']) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s|tojson }}"
    ),
    "the same long text": "{% set s = 'x' * 999999 %}{{ [s, s, s, s, s, s, s, s, s]|join }}",
    "a separator": "{{ ('x' * 99999).join(range(9999)|map('string')|list) }}",
    "the filter's separator": "{{ range(9999)|join('x' * 99999) }}",
    "padding": "{{ 'x'.ljust(10**9) }}",
    "zeros": "{{ 'x'.zfill(10**9) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "the filter center": "{{ 'x'|center(10**9) }}",
    "the filter indent": "{{ ('x\n' * 99999)|indent(99999) }}",
    "the filter batch": "{{ [1]|batch(10**9, 'x')|list|length }}",
    "the filter slice": "{{ [1]|slice(10**9)|list|length }}",
    "the filter sum": "{{ ([[1]] * 99999)|sum(start=[])|length }}",
    "rounding": "{{ 1.5|round(10**9, 'ceil') }}",
    "JSON with wide lines": "{{ range(99999)|list|tojson(indent=99999) }}",
    "JSON with long lines": "{{ range(99999)|list|tojson(indent='x' * 99999) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width from outside": "{{ '%*d' % (10**9, 1) }}",
    "a precision": "{{ '%.1000000000f' % 1 }}",
    "a format": "{{ '{:1000000000}'.format(1) }}",
    "a format in a format": "{{ '{:{}}'.format(1, 10**9) }}",
    "a format with a map": "{{ '{x:1000000000}'.format_map(dict(x=1)) }}",
    "a format many times": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "percent many times": "{{ ('%(x)s' * 99999) % dict(x='x' * 99999) }}",
    "a date": "{{ strftime_now('%1000000000d') }}",
    "a power": "{{ 10 ** 10000000 }}",
    "squares": "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "marks without an end": "{{ '%c' % 983040 * 99999 }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "bytes": "{{ 'x'.encode().ljust(10**9) }}",
    "a table of letters": "{{ ('x' * 99999).translate({120: 'x' * 99999}) }}",
    "many lists": (
        "{% set n = namespace(s=[]) %}{% for i in range(9999) %}{% set n.s = [n.s, range(99999)|list] %}{% endfor %}"
    ),
    "many texts": (
        "{% set n = namespace(s=[]) %}{% for i in range(9999) %}{% set n.s = [n.s, 'x' * 999999] %}{% endfor %}"
    ),
}
HOSTILE = LOOPS | GROWTH
SYNTAX = {
    "a long source": " " * 200_001,
    "brackets": "{{ " + "(" * 9000 + ")" * 9000 + " }}",
    "loops": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "filters for pages": "{{ 'x'|urlize }}",
    "a mark": "\U000f0000",
    "nonsense": "{{ lipsum(9999) }}",
}
MESSAGES = [{"role": "user", "content": "what is it?"}]


def render(template, messages=MESSAGES, **options):
    return render_jinja_template([messages], chat_template=template, **options)[0][0]


WITH_MASK = ["nested loops", "generation in a loop", "a literal text"]


@pytest.mark.few(20)
@pytest.mark.parametrize(
    ("name", "mask"), [*((name, False) for name in HOSTILE), *((name, True) for name in WITH_MASK)]
)
def test_what_is_without_end_is_ended(name, mask):
    with pytest.raises(SecurityError):
        render(HOSTILE[name], return_assistant_tokens_mask=mask)


@pytest.mark.parametrize("name", SYNTAX)
def test_what_cannot_be_compiled_is_an_error_of_the_template(name):
    with pytest.raises((TemplateSyntaxError, jinja2.UndefinedError)):
        render(SYNTAX[name])


@pytest.mark.slow
def test_hostile_templates_take_little_memory():
    """The most that any of them takes, in a process of its own."""
    script = (
        "from vlm.training.memory import _of_process; from tests.vlm.test_template_bounds import *\n"
        "before = _of_process('VmHWM')\n"
        "for template in HOSTILE.values():\n"
        "    try: render(template)\n"
        "    except SecurityError: pass\n"
        "print(_of_process('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500e6


USUAL = {
    "chatml": FLATTEN + CHATML,
    "tools": (
        "{% if tools %}{{ tools|tojson(indent=4) }}{% endif %}"
        "{% for m in messages %}{% if not loop.first %}\n{% endif %}"
        "{{ m.role|upper ~ ': ' ~ m['content']|trim }}{% endfor %}"
    ),
    "methods": (
        "{% for m in messages %}{{ m['content'].split('?')[0].strip().replace('what', 'WHAT').ljust(20) }}|"
        "{{ '%s has %d' % (m.role, m.content|length) }}|{{ '{0:>8}'.format(m.role) }}|"
        "{{ m.items()|list|length }}{% endfor %}"
    ),
    "macros": (
        "{% macro say(m, mark='#') %}{{ mark }} {{ m.role }}{% if caller %}{{ caller() }}{% endif %}{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{% call say(m) %}, {{ loop.index }}{% endcall %}{% endfor %}"
    ),
    "loops": (
        "{% for m in messages[::-1] %}{{ loop.cycle('a', 'b') }}{{ loop.last }}{{ loop.revindex }}{{ loop.length }}"
        "{% if loop.changed(m.role) %}!{% endif %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{% else %}none{% endfor %}"
    ),
    "values": (
        "{% set ns = namespace(a=[], n=0) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}"
        "{% set ns.n = ns.n + 2 ** 3 %}"
        "{% endfor %}{{ ns.a|unique|join(', ') }} {{ ns.n }} {{ ns.a|select('in', ['user'])|list }} "
        "{{ [3, 1]|sort }} {{ 7 // 2 }}"
        "{{ {'b': 1, 'a': 2}|dictsort }} {{ 'x' is in 'xyz' }} "
        "{{ messages|map(attribute='role')|first }} {{ -1.5|round }}"
        "{{ 'ab'|indent(2, first=true) }} {{ [[1, 2], [3]]|map('length')|sum }} {{ dict(a=1, **{'b': 2})|items|list }}"
    ),
    "missing": "{{ nothing }}{{ nothing|default('x') }}{{ messages[0].nothing is defined }}{{ nothing == 1 }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks": "{% set text %}a{{ messages|length }}{% endset %}{% filter upper %}{{ text }}b{% endfilter %}",
}
LONG = [{"role": ["user", "assistant"][i % 2], "content": f"what is number {i}? " * 50} for i in range(1000)]


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize(
    "messages", [MESSAGES, LONG[:3], LONG], ids=["one turn", "three turns", "a million characters"]
)
def test_what_models_write_is_as_before(name, messages, monkeypatch):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    options = {"tools": tools, "return_assistant_tokens_mask": name == "generation"}
    bounded = render_jinja_template([messages], chat_template=USUAL[name], **options)
    monkeypatch.setattr(
        chat_template_utils, "ImmutableSandboxedEnvironment", jinja2.sandbox.ImmutableSandboxedEnvironment
    )
    free = chat_template_utils._cached_compile_jinja_template(USUAL[name])
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", lambda template: free)
    assert isinstance(free.environment, jinja2.sandbox.SandboxedEnvironment)
    assert not isinstance(free.environment, BoundedEnvironment)
    assert bounded == render_jinja_template([messages], chat_template=USUAL[name], **options)


def test_a_long_conversation_may_take_more():
    loop = "{% for a in range(N) %}{% endfor %}".replace("N", "99999") * (STEPS // 99999 + 1)
    with pytest.raises(TemplateBoundsError, match=r"more than 3.0,000 steps"):
        render(loop)
    assert render(loop, LONG) == ""
    text = "{{ 'x' * N }}".replace("N", str(CHARACTERS + 1000))
    with pytest.raises(TemplateBoundsError, match="characters"):
        render(text)
    assert len(render(text, LONG)) == CHARACTERS + 1000


def test_every_filter_and_method_has_been_thought_of():
    """A new one of jinja2's, or of Python's, is refused until somebody has looked at what it can make."""
    refused = {"filesizeformat", "format", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"}
    assert FILTERS | refused == set(OF_JINJA)
    methods = {name for name, _ in inspect.getmembers(str, callable) if not name.startswith("_")}
    assert methods - STRING_METHODS == {"format", "format_map", "maketrans", "translate"}
    assert methods >= STRING_METHODS


def test_our_own_processor_and_those_of_transformers_are_bounded():
    _, processor = tiny()
    processor.chat_template = HOSTILE["nested loops"]
    for one in (processor, processor.tokenizer):
        with pytest.raises(TemplateBoundsError):
            one.apply_chat_template(MESSAGES, chat_template=HOSTILE["nested loops"])
    processor.tokenizer.name_or_path = "somebody/model"
    named = r"chat template of somebody/model, line 1: it takes more than .* steps.*harm"
    with pytest.raises(UserError, match=named), naming_template(processor):
        processor.apply_chat_template(MESSAGES)


def test_a_template_sees_no_objects_with_methods_that_write():
    _, processor = tiny()
    from PIL import Image

    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    messages = [{"role": "user", "content": [image]}]
    made = processor.apply_chat_template(messages, chat_template="{{ messages[0].content[0].image }}")
    assert json.dumps(made) == '"<Image>"'
