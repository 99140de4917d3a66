"""What editors and type checkers read of the package: `python tests/make_stubs.py` writes a .pyi beside each module.

They cannot follow the decorator `patch`, so here its methods stand in their classes. The wheel is built with these
files (setup.py), git does not keep them, and nobody edits them. What says no type is `Any`."""
import ast
import copy
import sys
from pathlib import Path

KEPT = {'property', 'cached_property', 'classmethod', 'staticmethod', 'contextmanager', 'dataclass'}
KNOWN = {'__init__': 'None', '__eq__': 'bool', '__hash__': 'int', '__repr__': 'str', '_repr_html_': 'str',
         '__str__': 'str'}
ANY, NOTHING = ast.Name('Any'), ast.Constant(...)


def named(node, *names): return getattr(getattr(node, 'func', node), 'id', None) in names
def patched(f): return any(named(d, 'patch') for d in f.decorator_list)
def declared(name, kind=ANY, value=None): return ast.AnnAssign(name, kind, value, 1)


def function(f, method=False, name=None, decorator=None):
    "Its signature alone; of a method the first argument needs no type."
    a = f.args
    decorators = [ast.Name(decorator)] if decorator else [d for d in f.decorator_list if named(d, *KEPT)]
    first = method and not any(named(d, 'staticmethod') for d in decorators)
    for k, arg in enumerate([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]):
        arg.annotation = None if first and k == 0 else arg.annotation or ANY
    a.defaults, a.kw_defaults = [NOTHING for _ in a.defaults], [d and NOTHING for d in a.kw_defaults]
    returns = f.returns or ast.Name(KNOWN.get(f.name, 'Any'))
    return ast.FunctionDef(name or f.name, a, [ast.Expr(NOTHING)], decorators, returns)


def members(c):
    "The body of a class: what stands in it, and what its methods set on themselves."
    fields, names, functions = [], [], [n for n in c.body if isinstance(n, ast.FunctionDef)]
    for n in c.body:
        if isinstance(n, ast.AnnAssign): fields.append(declared(n.target, n.annotation, n.value and NOTHING))
        if not isinstance(n, ast.Assign): continue
        for target in getattr(n.targets[0], 'elts', n.targets):
            if named(n.value, 'property'): names += ast.parse(f'@property\ndef {target.id}(self) -> Any: ...').body
            else: names.append(n if isinstance(n.value, ast.Name) else declared(target))
    known = {x.name for x in functions} | {x.target.id for x in [*fields, *names] if isinstance(x, ast.AnnAssign)}
    sets = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Attribute) and named(n.value, 'self')]
    more = {n.attr for n in sets if isinstance(n.ctx, ast.Store)} - known
    return fields + [declared(ast.Name(k)) for k in sorted(more)] + [function(f, True) for f in functions] + names


def stub(tree):
    "(what a module's stub holds, its classes by name) of a module's syntax tree."
    out, classes = ast.parse('from typing import Any').body, {}
    for n in tree.body:
        if isinstance(n, (ast.Import, ast.ImportFrom)): out.append(n)
        if isinstance(n, ast.FunctionDef) and not any(named(d, 'patch', 'property') for d in n.decorator_list):
            out.append(function(n))
        if isinstance(n, ast.ClassDef):
            kept = [d for d in n.decorator_list if named(d, *KEPT)]
            classes[n.name] = ast.ClassDef(n.name, n.bases, [], members(n) or [ast.Expr(NOTHING)], kept)
            out.append(classes[n.name])
        for target in n.targets if isinstance(n, ast.Assign) else ():
            names = getattr(target, 'elts', [target])
            out += [declared(name) for name in names if isinstance(name, ast.Name)]
    return out, classes


def attached(tree):
    "(class, member) of all that a module puts into classes: by `patch`, or as `Class.name = value`."
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for n in tree.body:
        if isinstance(n, ast.FunctionDef) and patched(n): yield n.args.args[0].annotation.id, function(n, True)
        for target in n.targets if isinstance(n, ast.Assign) else ():
            targets = getattr(target, 'elts', [target])
            values = getattr(n.value, 'elts', [n.value])
            for t, v in zip(targets, values):
                if not (isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id[:1].isupper()):
                    continue
                of = v.args[0] if named(v, 'property', 'classmethod') else v
                f = functions.get(getattr(of, 'id', None))
                how = v.func.id if of is not v else None
                yield t.value.id, function(copy.deepcopy(f), True, t.attr, how) if f else declared(ast.Name(t.attr))


def used(out):
    "Without what is imported for the code alone."
    names = {n.id for part in out for n in ast.walk(part) if isinstance(n, ast.Name)}
    for n in (n for n in out if isinstance(n, (ast.Import, ast.ImportFrom))):
        n.names = [a for a in n.names if (a.asname or a.name).split('.')[0] in names]
    return [n for n in out if getattr(n, 'names', True)]


def write_stubs(package, folder):
    "A .pyi in the folder for every module of the package; methods go to the class that they are patched into."
    trees = {file.stem: ast.parse(file.read_text(encoding='utf-8')) for file in sorted(Path(package).glob('*.py'))}
    made = {name: stub(tree) for name, tree in trees.items() if name not in ('_modidx', '__main__')}
    for name in made:
        for owner, member in attached(trees[name]):
            there = [c[owner] for k, (_, c) in made.items() if owner in c and (k == name or owner not in made[name][1])]
            for c in there[:1]: c.body.append(member)
    for name, (out, _) in made.items():
        text = ast.unparse(ast.fix_missing_locations(ast.Module(used(out), [])))
        (Path(folder)/f'{name}.pyi').write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    here = Path(__file__).resolve().parent.parent/'unlearn_nb'
    write_stubs(here, sys.argv[1] if sys.argv[1:] else here)
