"""The bolder drawing of faces, to take the place of the functions of these names in nbs/00_faces.ipynb (`band` goes).

face_descriptor.safetensors and the model beside this file were trained on it."""
from functools import lru_cache

@lru_cache
def unit_oval(a0, a1, n, power):
    "Points [n, 2] of an arc of the unit circle; power < 1 squares it."
    p = np.stack([np.cos(a := np.linspace(a0, a1, n)), np.sin(a)], -1)
    return np.sign(p) * abs(p) ** power

def oval(cx, cy, rx, ry, a0=0., a1=2 * pi, n=30, power=1.):
    "Points [n, 2] of an ellipse or of its arc from angle a0 to a1; power < 1 squares it."
    return unit_oval(a0, a1, n, power) * (rx, ry) + (cx, cy)

def eye_places(i):
    "Of the eyes: how far from the middle each is, how high, how large (a radius)."
    return .33 + .11 * i.eye_distance, .12 - .25 * i.eye_height, .15 + .075 * i.eye_size

def eyes(i, s):
    skin, iris, out = blend(SKIN, i.skin), blend(IRIS, i.eye_colour), []
    d, y, r = eye_places(i)
    for k in (-1, 1):
        gx, bend = k * d + .22 * r * s.gaze, np.linspace(-1, 1, 10)
        out += [("eyes", oval(k * d, y - .01, r * 1.24, r * 1.20), tint(skin, -.5)),
                ("eyes", oval(k * d, y + .012, r * 1.12, r * 1.08), np.array((252., 252., 250.))),
                ("eyes", oval(gx, y + .015, r * .86, r * .90), iris),
                ("eyes", oval(gx, y + .015, r * .42, r * .46), np.array((22., 16., 20.))),
                ("eyes", oval(gx - .30 * r, y - .30 * r, r * .26, r * .26), np.array((255., 255., 255.)))]
        height = y - r * 1.2 - .15 - .05 * (1 - bend ** 2) - k * bend * (i.brow_angle - .45) * .26
        out.append(("brows", stroke(np.stack([k * d + bend * .23, height], -1), .10 + .13 * i.brow_thickness),
                    tint(blend((blend(HAIRS, i.hair_colour), (60, 40, 36)), .35), -.15)))
    return out

def mouth(i, s):
    skin, w, y = blend(SKIN, i.skin), .22 + .20 * i.mouth_width, .58
    red = blend((tint(skin, -.35), (196, 60, 70)), .35 + .5 * i.lips)
    def line(x): return y + .20 * s.smile * (.12 - .75 * (x / w) ** 2)   # between the lips
    def bow(x): return 1 - (x / w) ** 2
    if s.mouth_open <= .35:
        t = .08 + .11 * i.lips
        lips = np.concatenate([graph(-w, w, lambda x: line(x) - t * bow(x)), graph(w, -w, lambda x: line(x) + 1.2 * t * bow(x))])
        return [("mouth", lips, red), ("mouth", stroke(graph(-w, w, line), .10), tint(red, -.45))]
    g = .09 + .17 * (s.mouth_open - .35)
    gap = np.concatenate([graph(-w, w, line), graph(w, -w, lambda x: line(x) + 2 * g * bow(x) + .02)])
    teeth = np.concatenate([graph(-.8 * w, .8 * w, line), graph(.8 * w, -.8 * w, lambda x: line(x) + .7 * g * bow(x))])
    return [("mouth", (gap - (0, y)) * (1.06 + .08 * i.lips, 1.12 + .2 * i.lips) + (0, y - .01), red),
            ("mouth", gap, np.array((110., 30., 40.))), ("mouth", teeth, np.array((255., 250., 244.)))]

def marks(i, s):
    skin, out = blend(SKIN, i.skin), []
    spots = ((-.10, -.02), (.10, 0.), (0., .12)) if i.freckles > .5 else ()
    out += [("face", oval(k * .40 + dx, .36 + dy, .048, .048, n=10), tint(skin, -.36)) for k in (-1, 1) for dx, dy in spots]
    if i.mole > 0:
        side, drift = (-1 if i.mole <= .5 else 1), i.mole % .5
        out.append(("face", oval(side * .40 + .2 * drift, .44 + .2 * drift, .08, .08, n=14), np.array((70., 40., 34.))))
    return out

def hair_front(i, s):
    colour, w, style = blend(HAIRS, i.hair_colour), half_width(i), i.hair_style
    def cap(y, lift, arch, slope=0., wave=0.):  # from the top of the skull to the hair line
        line = graph(w + .06, -w - .06, lambda x: y - arch * (1 - (x / (w + .06)) ** 2) + slope * x + wave * np.cos(13 * x), 40)
        return np.concatenate([oval(0, -.12, w + .07, .92 + lift, pi, 2 * pi), line])
    caps = {"crop": cap(-.16, .02, .42, 0., .06), "quiff": cap(-.2, .02, .36), "spikes": cap(-.22, 0., .34), "bob": cap(.05, .08, .55), "long": cap(0., .10, .62),
            "bun": cap(-.2, .03, .46), "fringe": cap(-.12, .10, .16, 0., .06), "side": cap(.05, .10, .42, .20)}
    out = [("hair", caps[style], colour)] if style in caps else []
    wave = np.concatenate([oval(.1, -.98, .62, .34, .9 * pi, 2.05 * pi), [(.4, -.62), (-.5, -.58)]])
    spikes = [[(x - .24, -.72 + .3 * abs(x)), (x * 1.3, -1.4 + .4 * x * x), (x + .24, -.72 + .3 * abs(x))] for x in np.linspace(-.6, .6, 5)]
    falls = {"bob": lambda k: [(k * (w - .06), -.5), (k * (w + .28), -.3), (k * (w + .33), .62), (k * (w + .02), .72), (k * (w - .08), .1)],
             "long": lambda k: [(k * (w - .10), -.5), (k * (w + .26), -.3), (k * (w + .36), 1.5), (k * (w - .02), 1.5), (k * (w - .04), .2)]}
    out += [("hair", p, colour) for p in {"quiff": [wave], "spikes": spikes}.get(style, [])]
    out += [("hair", falls[style](k), colour) for k in (-1, 1) if style in falls]
    if style == "curls":
        out += [("hair", oval(x, -.74 + .42 * (x / w) ** 2, .25, .24), tint(colour, .05 * np.cos(9 * x) + .05)) for x in np.linspace(-w + .05, w - .05, 6)]
    elif style not in ("bald", "spikes"):  # a highlight
        out.append(("hair", stroke(graph(-.42, .42, lambda x: -.88 + .14 * x * x), .07), tint(colour, .2)))
    return out

def glasses(i, s):
    if i.glasses == "none": return []
    d, y, r = eye_places(i)
    r = 1.24 * r + .085
    if i.glasses == "round": rim, colour = oval(0, 0, r, r), np.array((190., 40., 70.))
    else: rim, colour = oval(0, 0, r * 1.05, r * .95, power=.2), np.array((36., 36., 56.))
    rim = np.concatenate([rim, rim[:1], rim[:1] * (1 - .1 / r), rim[::-1] * (1 - .1 / r)])   # a hole for the eye
    def bar(x0, x1): return [(x0, y - .1), (x1, y - .1), (x1, y), (x0, y)]
    spans = [(-half_width(i), .05 - d - r), (r - d - .05, d - r + .05), (d + r - .05, half_width(i))]   # ear, nose, ear
    points = [rim + (k * d, y) for k in (-1, 1)] + [bar(*x) for x in spans if x[0] < x[1]]
    return [("glasses", p, colour) for p in points]

def paint(identity, scene, canvas, colour_of):
    "Paint all parts on a square canvas; colour_of(part, RGB) chooses each fill."
    pen, side, a = ImageDraw.Draw(canvas), canvas.width, scene.tilt * pi / 180
    turn = np.array([[cos(a), sin(a)], [-sin(a), cos(a)]])
    for shapes in PARTS:
        for part, points, colour in shapes(identity, scene):
            p = (np.asarray(points) * .345 * scene.scale @ turn + (.5 + scene.x, .53 + scene.y)) * side
            pen.polygon(p.ravel().tolist(), fill=colour_of(part, colour))
    return canvas
