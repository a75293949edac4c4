"""What the tiny model reads and says: captions, questions, answers, and how an answer is scored by meaning.

Everything is derived from the `info` dictionary that render.py returns with an image, so the text is true
by construction. `qa(rng, info, kind)` gives one question, one answer and the truth; `score(kind, truth, text)`
reads an answer back: True or False. Wordings are skewed: the first of a list is said most often, so that a small
model's greedy answer has one clear favourite while it still understands many ways to ask.
"""
import os
import re

# Class -> noun phrases, without article. The first is the favourite.
NAMES = {
    "disturbed": ["disturbed galaxy", "disturbed galaxy with a distorted shape", "peculiar, disturbed galaxy"],
    "merging": ["pair of merging galaxies", "pair of colliding galaxies", "galaxy merger"],
    "round_smooth": ["round smooth galaxy", "round elliptical galaxy", "smooth, round galaxy"],
    "in_between_smooth": ["in-between smooth galaxy", "smooth oval galaxy", "smooth galaxy of in-between roundness"],
    "cigar_smooth": ["cigar-shaped smooth galaxy", "smooth cigar-shaped galaxy", "smooth, very elongated galaxy"],
    "barred_spiral": ["barred spiral galaxy", "spiral galaxy with a bar", "barred spiral"],
    "tight_spiral": ["tightly wound spiral galaxy", "spiral galaxy with tight arms", "tight unbarred spiral galaxy"],
    "loose_spiral": ["loosely wound spiral galaxy", "spiral galaxy with loose arms", "loose unbarred spiral galaxy"],
    "edge_on_no_bulge": ["edge-on galaxy without a bulge", "bulgeless edge-on galaxy", "thin edge-on galaxy with no bulge"],
    "edge_on_bulge": ["edge-on galaxy with a bulge", "edge-on galaxy with a central bulge", "bulged edge-on galaxy"],
    "globular_cluster": ["globular cluster", "globular star cluster"],
    "open_cluster": ["open cluster", "open star cluster"],
    "planetary_nebula": ["planetary nebula", "planetary nebula shed by a dying star"],
    "emission_nebula": ["emission nebula", "glowing emission nebula", "cloud of glowing gas"],
    "supernova_remnant": ["supernova remnant", "remnant of a supernova"],
    "dark_nebula": ["dark nebula", "dark cloud of dust"],
    "ringed_planet": ["ringed planet", "planet with rings"],
    "banded_planet": ["banded giant planet", "gas giant with cloud bands", "banded gas giant"],
    "cratered_moon": ["cratered moon", "moon covered in craters"],
    "comet": ["comet", "bright comet"],
    "gravitational_lens": ["gravitational lens", "gravitational lens with arcs"],
    "star_field": ["star field", "field of stars"],
}
GALAXIES = list(NAMES)[:10]
GROUPS = {
    "galaxy": GALAXIES,
    "nebula": ["planetary_nebula", "emission_nebula", "supernova_remnant", "dark_nebula"],
    "planet": ["ringed_planet", "banded_planet"],
    "star cluster": ["globular_cluster", "open_cluster"],
    "comet": ["comet"], "moon": ["cratered_moon"], "gravitational lens": ["gravitational_lens"],
    "star field": ["star_field"],
}
COLORS = ("blue", "red", "orange", "yellow", "white", "green", "pink", "brown", "gray")
PLACES = ("upper left", "top", "upper right", "left", "centre", "right", "lower left", "bottom", "lower right")
PLACE_PHRASES = ("in the upper left", "at the top", "in the upper right", "on the left", "in the centre",
                 "on the right", "in the lower left", "at the bottom", "in the lower right")
NUMBERS = ("no", "one", "two", "three", "four", "five")
SIZES = ("small", "medium", "large")
ODD = ("satellite trail", "bad column", "cosmic ray", "blurred", "ghost reflection")
ODD_PHRASES = {"satellite trail": "a satellite trail crosses the image", "bad column": "there is a bad column",
               "cosmic ray": "there is a cosmic ray hit", "blurred": "the image is blurred",
               "ghost reflection": "there is a ghost reflection"}
UNKNOWABLE = {  # what no image of this kind says -> ways to ask
    "distance": ["How far away is it?", "What is its distance?", "How many light years away is this object?",
                 "What is the distance to this object?"],
    "name": ["What is its name?", "What is this object called?", "Which catalogue number does it have?",
             "What is the name of this object?"],
    "age": ["How old is it?", "What is its age?", "When did it form?"],
    "mass": ["What is its mass?", "How massive is it?", "How heavy is this object?"],
    "redshift": ["What is its redshift?", "What redshift does it have?"],
    "telescope": ["Which telescope took this image?", "What telescope was used?", "Which camera took this picture?"],
    "date": ["When was this image taken?", "On which date was this taken?", "In which year was this picture taken?"],
    "temperature": ["How hot is it?", "What is its temperature?"],
    "speed": ["How fast does it move?", "What is its radial velocity?"],
    "constellation": ["In which constellation is it?", "Where in the sky is this object?"],
    "photographer": ["Who took this image?", "Who discovered it?"],
    "magnitude": ["What is its magnitude?", "What is its true diameter?", "How large is it in light years?"],
}
CANNOT = ["I cannot tell from this image.", "That cannot be told from this image.", "The image does not show that.",
          "I cannot tell that from the image alone."]

CAPTION_PROMPTS = ["Describe this image.", "Describe the following image.", "Caption this image.",
                   "What does this image show?", "Write a caption for this image.", "Describe the image.",
                   "What do you see in this image?", "What is shown here?", "Give a short description of this picture.",
                   "Please describe this astronomical image.", "Describe this picture.", "What can you see?",
                   "Provide a caption.", "Tell me about this image."]
QUESTIONS = {
    "class": ["What is this?", "What kind of object is this?", "What is it?", "What is this object?",
              "What type of object is shown?", "Which kind of astronomical object is this?", "What am I looking at?",
              "Can you identify this object?", "Name the type of this object.", "Classify this object.",
              "What sort of object do you see?", "What object is in the image?", "What is the main object?",
              "Which class of object does the image show?", "What kind of astronomical object is in this image?"],
    "bar": ["Is there a bar?", "Does it have a bar?", "Does this galaxy have a bar?", "Is this galaxy barred?",
            "Is there a bar across the centre?", "Do you see a central bar?", "Is a bar visible?"],
    "arms": ["How many spiral arms are there?", "How many spiral arms does it have?", "How many arms do you see?",
             "Count the spiral arms.", "How many arms does this galaxy have?", "What is the number of spiral arms?"],
    "orientation": ["Is it edge-on or face-on?", "Is it face-on or edge-on?", "Is it seen edge-on or face-on?",
                    "How is the galaxy oriented?", "From which direction do we see it, edge-on or face-on?",
                    "What is its orientation?", "Do we see this galaxy edge-on, face-on or inclined?"],
    "color": ["Which colour dominates?", "What colour is it?", "What color is it?", "What is the dominant colour?",
              "What is the main color of the object?", "Which color dominates the image?", "What is its colour?"],
    "position": ["Where is it in the image?", "Where in the frame is the object?", "Where is the object?",
                 "In which part of the image is it?", "Whereabouts in the frame is it?", "What is its position in the image?"],
    "stars": ["How many bright stars are there?", "How many bright stars do you see?", "Count the bright stars.",
              "How many bright foreground stars are in the image?", "How many bright stars can you see?",
              "What is the number of bright stars?"],
    "odd": ["Is anything odd in this image?", "Is there anything odd?", "Do you see any artefacts?",
            "Is anything wrong with this image?", "Are there any artifacts or defects?", "Are there any artefacts in this image?",
            "Does anything look unusual?"],
    "rings": ["Does it have rings?", "Are there rings around it?", "Do you see rings?", "Does this planet have rings?"],
    "tail": ["Does it have a tail?", "Is there a tail?", "Do you see a tail?", "Is a tail visible?"],
    "dust_lane": ["Is there a dust lane?", "Does it have a dust lane?", "Do you see a dust lane?",
                  "Is a lane of dust visible?"],
    "two": ["Are there two galaxies?", "Are two galaxies present?", "Is there more than one galaxy?",
            "Do you see two galaxies?", "How many galaxies are there, one or two?"],
    "size": ["How large is it in the frame?", "How big is it in the image?", "How much of the frame does it fill?",
             "Is it small or large in the frame?", "What is its size in the image?"],
    "caption": CAPTION_PROMPTS,
}
IS_A = ["Is this a {}?", "Is it a {}?", "Does the image show a {}?", "Is the object a {}?", "Do you see a {}?"]
CHOICE = ["Is this a {} or a {}?", "Is it a {} or a {}?", "Which is it, a {} or a {}?", "Does this show a {} or a {}?"]
KINDS = list(QUESTIONS) + ["is_a", "choice", "unknowable"]


def pick(rng, options, favourite=0.0):
    """One of options; the first with at least the given probability."""
    return options[0] if favourite and rng.random() < favourite else options[rng.randrange(len(options))]


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capital(text):
    return text[0].upper() + text[1:]


def place_of(position):
    """[x, y] in 0..1, y down -> 0..8, the cell of a 3 x 3 grid read row by row."""
    x, y = (min(max(v, 0.0), 0.999) for v in position)
    return int(3 * y) * 3 + int(3 * x)


def size_of(extent):
    return SIZES[0 if extent < 0.33 else 1 if extent < 0.66 else 2]


def group_of(cls):
    return next(g for g, members in GROUPS.items() if cls in members)


def truths(info):
    """Every question kind that fits this image -> its truth; None is 'cannot tell'."""
    cls = info["class"]
    t = {"class": cls, "caption": cls, "color": info["color"], "odd": info["odd"] or "nothing",
         "stars": info["bright_stars"], "arms": info["arms"], "bar": info["bar"], "orientation": info["orientation"],
         "position": None if info["position"] is None else place_of(info["position"]),
         "size": None if info["extent"] is None else size_of(info["extent"]),
         "rings": info["rings"], "tail": info["tail"], "dust_lane": info["dust_lane"], "unknowable": None}
    if cls != "gravitational_lens":         # a lens holds galaxies, so "a galaxy?" has no plain answer there
        t.update(two="yes" if info["n_galaxies"] == 2 else "no", is_a=cls, choice=cls)
    return t


def qa(rng, info, kind):
    """(question, answer, truth) for one kind of question about one image; truth as score() wants it."""
    truth = truths(info)[kind]
    name = article(pick(rng, NAMES[info["class"]], 0.7))
    if kind == "caption":
        return pick(rng, CAPTION_PROMPTS, 0.2), caption(rng, info), truth
    if kind == "unknowable":
        topic = pick(rng, list(UNKNOWABLE))
        return pick(rng, UNKNOWABLE[topic]), pick(rng, CANNOT, 0.6), None
    if kind in ("is_a", "choice"):
        return is_a(rng, info["class"], name) if kind == "is_a" else choice(rng, info["class"])
    question = pick(rng, QUESTIONS[kind], 0.1)
    if truth is None:
        return question, pick(rng, CANNOT, 0.6), None
    return question, pick(rng, answers(kind, truth, name), 0.7), truth


def is_a(rng, cls, name):
    own = group_of(cls)
    group = own if rng.random() < 0.5 else pick(rng, [g for g in GROUPS if g != own])
    truth = "yes" if group == own else "no"
    text = "Yes, it is %s." % name if truth == "yes" else "No, it is %s." % name
    return pick(rng, IS_A, 0.2).format(group), text, truth


def choice(rng, cls):
    own = group_of(cls)
    pair = [own, pick(rng, [g for g in GROUPS if g != own])]
    rng.shuffle(pair)
    return pick(rng, CHOICE, 0.2).format(*pair), "It is %s." % article(own), own


def answers(kind, truth, name):
    """The ways to say a truth, favourite first."""
    if kind == "class":
        return ["This is %s." % name, "It is %s." % name, "%s." % capital(name)]
    if kind in ("stars", "arms"):
        noun = {"stars": "bright star", "arms": "spiral arm"}[kind] + ("" if truth == 1 else "s")
        verb = "is" if truth == 1 else "are"
        return ["There %s %s %s." % (verb, NUMBERS[truth], noun), "I count %s %s." % (NUMBERS[truth], noun)]
    if kind == "color":
        return ["It is mostly %s." % truth, "The dominant colour is %s." % truth]
    if kind == "orientation":
        return ["It is seen %s." % truth if truth != "inclined" else "It is inclined.", "The galaxy is %s." % truth]
    if kind == "position":
        return ["It is %s of the frame." % PLACE_PHRASES[truth], "The object is %s." % PLACE_PHRASES[truth]]
    if kind == "size":
        return {"small": ["It is small in the frame.", "It fills a small part of the frame."],
                "medium": ["It is of medium size in the frame.", "It fills about half of the frame."],
                "large": ["It is large in the frame.", "It fills most of the frame."]}[truth]
    if kind == "odd":
        if truth == "nothing":
            return ["No, nothing odd.", "Nothing odd, the image looks clean."]
        return ["Yes, %s." % ODD_PHRASES[truth]]
    noun = {"bar": "a bar", "rings": "rings", "tail": "a tail", "dust_lane": "a dust lane", "two": "two galaxies"}[kind]
    if truth == "yes":
        return ["Yes, it has %s." % noun, "Yes, I see %s." % noun] if kind != "two" else ["Yes, there are two galaxies."]
    return ["No, I see no %s." % noun.replace("a ", "", 1)] if kind != "two" else ["No, there are not two galaxies."]


def caption(rng, info):
    """One or two sentences: what, its colour and place; then what else can be seen."""
    name = pick(rng, NAMES[info["class"]], 0.7)
    if info["color"] and rng.random() < 0.6:
        first = article(info["color"] + " " + name)
    else:
        first = article(name)
    if info["position"] is not None and rng.random() < 0.6:
        first += " %s of the frame" % PLACE_PHRASES[place_of(info["position"])]
    first = pick(rng, ["%s.", "This image shows %s.", "The image shows %s.", "An image of %s."], 0.4) % first
    extra = []
    if info["orientation"] and "edge" not in info["class"] and rng.random() < 0.5:
        extra.append("it is inclined" if info["orientation"] == "inclined" else "it is seen " + info["orientation"])
    if info["arms"] and rng.random() < 0.6:
        extra.append("it has %s spiral arms" % NUMBERS[info["arms"]])
    if info["dust_lane"] == "yes" and rng.random() < 0.7:
        extra.append("a dust lane crosses it")
    if info["extent"] is not None and rng.random() < 0.25:
        extra.append({"small": "it is small in the frame", "medium": "it is of medium size",
                      "large": "it fills most of the frame"}[size_of(info["extent"])])
    if info["bright_stars"] and rng.random() < 0.6:
        n = info["bright_stars"]
        extra.append("there %s %s bright star%s" % ("is" if n == 1 else "are", NUMBERS[n], "" if n == 1 else "s"))
    if info["odd"] and rng.random() < 0.8:
        extra.append(ODD_PHRASES[info["odd"]])
    second = " " + capital(" and ".join(extra[:1] + extra[-1:] if len(extra) > 2 else extra)) + "." if extra else ""
    return capital(first) + second


# ---- short texts: what CLIP is asked with --------------------------------------------------------------------------

TEMPLATES = ["a photo of {a}", "{name}", "an image of {a}", "a telescope image of {a}", "this image shows {a}", "{a}",
             "a picture of {a}", "an astronomical image of {a}", "{a} in the sky", "{a} seen with a telescope"]
# Class -> entries of labels.txt that fit it, the closest first. What fits nothing here is never shown to the model as right.
FITTING = {
    "disturbed": """disturbed galaxy with a distorted shape; irregular galaxy; interacting galaxies; starburst galaxy; warped
        galactic disk; stellar streams and shells around a galaxy; studying how galaxies grow by mergers""",
    "merging": """pair of merging galaxies; interacting galaxies; tidal tails and bridges between galaxies; starburst galaxy;
        luminous infrared galaxy; studying how galaxies grow by mergers""",
    "round_smooth": """round smooth galaxy; elliptical galaxy; giant elliptical galaxy at the centre of a cluster; measuring the
        light profiles of elliptical galaxies""",
    "in_between_smooth": """smooth oval galaxy; elliptical galaxy; lenticular galaxy; measuring the light profiles of elliptical
        galaxies""",
    "cigar_smooth": """smooth cigar-shaped galaxy; lenticular galaxy; elliptical galaxy; measuring the light profiles of
        elliptical galaxies""",
    "barred_spiral": """barred spiral galaxy; spiral galaxy; stellar bar in a galaxy; spiral arms; studying how bars drive gas to
        the centre of galaxies; tracing the structure of spiral arms""",
    "tight_spiral": "tightly wound spiral galaxy; spiral galaxy; spiral arms; tracing the structure of spiral arms",
    "loose_spiral": "loosely wound spiral galaxy; spiral galaxy; spiral arms; tracing the structure of spiral arms",
    "edge_on_no_bulge": """edge-on galaxy without a bulge; edge-on spiral galaxy; galactic disk seen edge-on; measuring the
        thickness of galactic disks""",
    "edge_on_bulge": """edge-on galaxy with a central bulge; edge-on spiral galaxy; galactic disk seen edge-on; galactic bulge;
        measuring the thickness of galactic disks""",
    "globular_cluster": """globular cluster; horizontal branch stars; blue stragglers; multiple populations in a star cluster;
        dating a globular cluster by its oldest stars; measuring proper motions in a star cluster; searching for
        intermediate-mass black holes; mass segregation in a star cluster""",
    "open_cluster": """open star cluster; young massive star cluster; stellar association; main sequence turn-off; mass
        segregation in a star cluster; dating a stellar population from its colours and magnitudes; counting low-mass stars
        to find the initial mass function; searching for brown dwarfs in young clusters""",
    "planetary_nebula": """planetary nebula; expanding shell of gas; mass loss from a dying star; studying how dying stars shed
        their envelopes; determining the composition of a nebula from its emission lines""",
    "emission_nebula": """emission nebula; region of ionised hydrogen; star formation; ionisation front; surveying young stars in
        a star-forming region; studying how massive stars shape their surroundings; determining the composition of a nebula
        from its emission lines""",
    "supernova_remnant": """supernova remnant; glowing filaments of gas; shock waves in gas; supernova explosion; measuring the
        expansion of a supernova remnant""",
    "dark_nebula": "dark nebula; molecular cloud; interstellar dust; interstellar extinction",
    "ringed_planet": "ringed planet; planetary rings; gas giant planet; searching for new moons and rings",
    "banded_planet": """banded giant planet; gas giant planet; cloud bands on a giant planet; storm on a giant planet; monitoring
        weather on the giant planets""",
    "cratered_moon": "cratered moon; impact craters; icy moon; counting craters to date a surface",
    "comet": "comet; tail of a comet; coma and nucleus of a comet; tracking the activity of a comet",
    "gravitational_lens": """gravitational lens; arcs of a gravitational lens; einstein ring; galaxy cluster acting as a lens;
        finding faint distant galaxies behind a lens; mapping mass in a galaxy cluster with strong lensing""",
    "star_field": """star field; crowded field of stars; stars in the galactic bulge; calibrating a camera on a standard star
        field""",
}
FITTING = {cls: [" ".join(label.split()) for label in text.split(";")] for cls, text in FITTING.items()}
LABELS = [line.strip() for line in open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "labels.txt"))
          if not line.startswith(("#", "["))]
assert all(label in LABELS for some in FITTING.values() for label in some)


def prompt(template, name):
    return template.format(a=article(name), name=name)


def fitting_labels(info):
    """Label of labels.txt -> how well it fits this image: the name of the class itself counts three times."""
    cls = info["class"]
    fit = dict.fromkeys(FITTING[cls], 1.0)
    fit[FITTING[cls][0]] = 3.0
    also = []
    if cls in GALAXIES:
        also += ["classifying galaxy shapes"]
    if info["bar"] == "yes":
        also += ["stellar bar in a galaxy"]
    if info["dust_lane"] == "yes":
        also += ["dust lane across a galaxy", "mapping dust in galaxies"]
    if info["orientation"] == "face-on" and cls.endswith("spiral"):
        also += ["face-on spiral galaxy"] + (["grand design spiral galaxy"] if info["arms"] == 2 else [])
    if cls == "emission_nebula" and info["color"] == "blue":
        also += ["reflection nebula"]
    fit.update(dict.fromkeys(also, 1.0))
    return fit


# ---- reading an answer back ------------------------------------------------------------------------------------

SHORTER = {"banded_planet": ["banded giant", "gas giant"], "merging": ["merging galaxies", "colliding galaxies"],
           "dark_nebula": ["dark cloud"], "cratered_moon": ["moon covered"], "barred_spiral": ["barred galaxy"]}   # also clear
PHRASES = [(p, c) for names in (NAMES, SHORTER) for c, ps in names.items() for p in ps]
CANNOT_RE = re.compile(r"cannot|can't|not possible|does not (show|say|tell)|unable|unknown")


def named_class(text):
    """The class that a text names first (longest wording at that place), or None."""
    text = text.lower()
    found = [(text.find(p), -len(p), c) for p, c in PHRASES if p in text]
    return min(found)[2] if found else None


def says_cannot(text):
    return bool(CANNOT_RE.search(text.lower()))


def first_of(text, options):
    """Index of the option (a word or phrase) that occurs first in the text, longest first, or None."""
    text = " " + re.sub(r"[^a-z0-9-]+", " ", text.lower()) + " "
    found = [(text.find(" %s " % o), -len(o), i) for i, o in enumerate(options) if " %s " % o in text]
    return min(found)[2] if found else None


def read(kind, text):
    """The truth value that an answer of this kind states, None where it says that it cannot tell."""
    if says_cannot(text):
        return None
    if kind in ("class", "caption"):
        return named_class(text)
    if kind in ("stars", "arms"):
        i = first_of(text, NUMBERS + tuple("012345"))
        return "?" if i is None else i % 6
    if kind == "color":
        i = first_of(text.lower().replace("grey", "gray"), COLORS)
        return "?" if i is None else COLORS[i]
    if kind == "orientation":
        i = first_of(text, ("edge-on", "face-on", "inclined"))
        return "?" if i is None else ("edge-on", "face-on", "inclined")[i]
    if kind == "position":
        i = first_of(text.lower().replace("center", "centre"), PLACES)
        return "?" if i is None else i
    if kind == "size":
        i = first_of(text, ("small", "medium", "large", "half", "most"))
        return "?" if i is None else SIZES[(0, 1, 2, 1, 2)[i]]
    if kind == "odd":
        i = first_of(text, ODD)
        return "nothing" if i is None else ODD[i]
    if kind == "choice":
        i = first_of(text, list(GROUPS))
        return "?" if i is None else list(GROUPS)[i]
    i = first_of(text, ("yes", "no"))
    return "?" if i is None else ("yes", "no")[i]


def score(kind, truth, text):
    """Whether an answer means the truth."""
    return read(kind, text) == truth


# ---- the prompt: LLaVA's vicuna_v1 -----------------------------------------------------------------------------

SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the human's questions.")
BEFORE_IMAGE = SYSTEM + " USER: "        # one part of the text; the tokenizer sees each part on its own


def first_turn(question):
    return "\n%s ASSISTANT:" % question


def next_turn(question):
    return "USER: %s ASSISTANT:" % question


CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% set messages = messages[1:] %}{% else %}" + SYSTEM.replace("'", "\\'").join(["{{ '", "' }}"]) + "{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ (' ' if loop.first else '') + 'USER: ' + "
    "message['content'] }}{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}")


def random_info(rng):
    """Made-up labels with render.py's keys: enough to write the corpus that the vocabularies are learned from."""
    cls = pick(rng, list(NAMES))
    maybe = lambda options: pick(rng, options)
    return {"class": cls, "bar": maybe(["yes", "no", None]), "arms": maybe([0, 2, 3, 4, None]),
            "orientation": maybe(["edge-on", "face-on", "inclined", None]), "color": maybe(COLORS),
            "position": maybe([None, [rng.random(), rng.random()]]), "extent": maybe([None, rng.random()]),
            "bright_stars": maybe([None, 0, 1, 2, 3, 4, 5]), "odd": maybe([None, *ODD]),
            "rings": maybe(["yes", "no", None]), "tail": maybe(["yes", "no", None]),
            "dust_lane": maybe(["yes", "no", None]), "n_galaxies": maybe([1, 2, None]), "mono": False}


def corpus(rng, n):
    """n lines for the vocabularies: prompts, questions and answers as the tokenizer will see them, and a little
    general English, so that words outside the templates do not fall to single bytes at once."""
    for _ in range(n):
        info = random_info(rng)
        kind = pick(rng, [k for k in KINDS if k in truths(info)])
        question, answer, _ = qa(rng, info, kind)
        yield BEFORE_IMAGE
        yield "(%s ASSISTANT:" % question          # "(" stands for the newline: the word after it has no space before
        yield "USER: %s ASSISTANT: %s" % (question, answer)
        yield answer
        yield caption(rng, info)


if __name__ == "__main__":                          # every answer that this file writes must be read back as its truth
    import random
    rng = random.Random(1)
    for i in range(40000):
        info = random_info(rng)
        for kind in truths(info):
            q, a, truth = qa(rng, info, kind)
            assert score(kind, truth, a), (kind, truth, q, a, read(kind, a))
            if i < 2:
                print("%-12s %s -> %s" % (kind, q, a))
