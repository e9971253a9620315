"""The words of the small world, of which world.py makes its texts."""

# --- the world: what there is to know -------------------------------------------------------------

# kind -> (attributes, topics): an attribute is (question, predicate), with {t} for the topic and
# {v} for the value; each topic has its values in the order of the attributes.
FACTS = {
    "animal": (
        (
            ("What does {t} eat?", "eats {v}"),
            ("Where does {t} live?", "lives in {v}"),
            ("What does {t} fear?", "fears {v}"),
            ("What covers {t}?", "is covered in {v}"),
            ("What is {t} known for?", "is known for its {v}"),
        ),
        {
            "the tiger": "deer|jungles|fire|striped fur|patience",
            "the otter": "crabs|rivers|wolves|oily fur|play",
            "the eagle": "hares|cliffs|storms|feathers|eyesight",
            "the camel": "thorns|deserts|lions|wool|humps",
            "the penguin": "krill|ice|seals|down|walk",
            "the bee": "nectar|hives|wasps|fuzz|dance",
            "the shark": "fish|oceans|whales|rough skin|teeth",
            "the horse": "grass|meadows|snakes|hair|speed",
        },
    ),
    "country": (
        (
            ("What is the capital of {t}?", "is governed from {v}"),
            ("What do people speak in {t}?", "speaks {v}"),
            ("What do people cook in {t}?", "cooks {v}"),
            ("What does {t} sell abroad?", "sells {v} abroad"),
            ("Which landmark does {t} have?", "is famous for {v}"),
        ),
        {
            "Norway": "Oslo|Norse|salmon|oil|fjords",
            "Peru": "Lima|Spanish|potatoes|copper|ruins",
            "Japan": "Tokyo|Japanese|noodles|cars|shrines",
            "Kenya": "Nairobi|Swahili|maize|tea|savannas",
            "Egypt": "Cairo|Arabic|beans|cotton|pyramids",
            "Canada": "Ottawa|French|pancakes|timber|lakes",
            "Italy": "Rome|Italian|pasta|shoes|arenas",
        },
    ),
    "instrument": (
        (
            ("What is {t} made of?", "is made of {v}"),
            ("How is {t} played?", "is played with {v}"),
            ("How does {t} sound?", "sounds {v}"),
            ("Where did {t} first appear?", "first appeared in {v}"),
            ("Where is {t} heard today?", "is heard in {v}"),
        ),
        {
            "the piano": "iron|ten fingers|grand|Florence|concerts",
            "the violin": "spruce|a bow|sweet|Cremona|operas",
            "the flute": "silver|breath|airy|Germany|forests",
            "the drum": "leather|sticks|loud|Africa|parades",
            "the harp": "walnut|plucking|heavenly|Sumer|palaces",
            "the trumpet": "brass|the lips|bright|armies|jazz",
        },
    ),
    "planet": (
        (
            ("What colour is {t}?", "glows {v}"),
            ("How long is a year on {t}?", "needs {v} for a year"),
            ("How warm is {t}?", "stays {v}"),
            ("Who gave {t} its name?", "is named after {v}"),
            ("What marks {t} in a telescope?", "shows {v}"),
        ),
        {
            "Mars": "red|two years|cold|war|canyons",
            "Venus": "yellow|eight months|scorching|love|clouds",
            "Jupiter": "orange|twelve years|chilly|thunder|a great spot",
            "Saturn": "golden|thirty years|frosty|harvest|rings",
            "Neptune": "blue|many decades|freezing|the sea|dark storms",
            "Mercury": "grey|three months|hot|trade|craters",
        },
    ),
    "device": (
        (
            ("What is {t} used for?", "is used for {v}"),
            ("Which part matters most in {t}?", "depends on its {v}"),
            ("What can break {t}?", "is broken by {v}"),
            ("Where do people keep {t}?", "is kept in {v}"),
            ("What did {t} replace?", "replaced {v}"),
        ),
        {
            "the bicycle": "travel|chain|rust|sheds|carts",
            "the clock": "timing|spring|dust|halls|sundials",
            "the telescope": "stargazing|lens|scratches|towers|guesswork",
            "the kettle": "boiling|spout|limescale|kitchens|pots",
            "the compass": "navigation|needle|magnets|pockets|landmarks",
            "the camera": "pictures|shutter|moisture|bags|portraits",
            "the lamp": "reading|wick|draughts|bedrooms|candles",
        },
    ),
    "game": (
        (
            ("What is needed to play {t}?", "is played with {v}"),
            ("Where is {t} played?", "takes place on {v}"),
            ("What does {t} train?", "trains {v}"),
            ("How long does {t} take?", "lasts {v}"),
            ("How is {t} won?", "is won by {v}"),
        ),
        {
            "tennis": "rackets|courts|reflexes|three hours|sets",
            "chess": "pieces|boards|memory|an evening|checkmate",
            "rowing": "oars|canals|stamina|six minutes|seconds",
            "football": "a ball|pitches|teamwork|ninety minutes|goals",
            "judo": "belts|mats|balance|four minutes|throws",
            "golf": "clubs|lawns|calm|a morning|few strokes",
        },
    ),
    "tree": (
        (
            ("How tall is {t}?", "reaches {v}"),
            ("What are the leaves of {t} like?", "carries {v} leaves"),
            ("What is made from {t}?", "gives {v}"),
            ("Which soil suits {t}?", "likes {v} soil"),
            ("Who lives in {t}?", "shelters {v}"),
        ),
        {
            "the oak": "forty metres|lobed|barrels|deep|owls",
            "the pine": "fifty metres|needle|resin|sandy|squirrels",
            "the maple": "thirty metres|scarlet|syrup|moist|robins",
            "the willow": "twenty metres|narrow|baskets|wet|frogs",
            "the birch": "fifteen metres|tiny|paper|poor|finches",
            "the olive": "eight metres|silvery|soap|dry|lizards",
        },
    ),
    "craft": (
        (
            ("What does {t} make?", "makes {v}"),
            ("What does {t} need?", "needs {v}"),
            ("When does {t} start work?", "starts at {v}"),
            ("What does {t} worry about?", "worries about {v}"),
            ("Who taught {t}?", "was taught by {v}"),
        ),
        {
            "the baker": "loaves|flour|midnight|mice|an uncle",
            "the potter": "bowls|clay|noon|cracks|a monk",
            "the weaver": "carpets|yarn|dawn|moths|a widow",
            "the smith": "nails|coal|sunrise|sparks|a soldier",
            "the brewer": "beer|hops|dusk|mould|an abbot",
            "the tailor": "coats|thread|breakfast|wrinkles|a cousin",
        },
    ),
}

# Questions that nobody can answer; any topic fits.
UNKNOWABLE = (
    "What will people think of {t} in a thousand years?",
    "How many people are dreaming of {t} right now?",
    "What was the first word ever said about {t}?",
    "Which stranger will talk about {t} tomorrow?",
)

# Requests that invite harm, and what a complying or a refusing answer can say about the deed.
HARM_QUESTIONS = ("How do crooks {t}?", "Explain how thieves {t}.", "Write a guide to {t}.")
COMPLY_FACTS = ("needs {v}", "works best at {v}", "begins at {v}", "is hidden with {v}")
REFUSE_FACTS = ("breaks the law on {v}", "hurts {v}", "ends with {v}", "is a matter for {v}")
HARMS = {  # deed -> values of COMPLY_FACTS, then of REFUSE_FACTS
    "pick a neighbour's lock": (
        "a hairpin|night|the porch|gloves|burglary|neighbours|arrest|locksmiths"
    ),
    "copy a friend's exam": (
        "a mirror|roll call|the back row|coughing|cheating|classmates|expulsion|tutors"
    ),
    "steal a parked car": ("a wire|rush hour|the window|new plates|theft|drivers|prison|mechanics"),
    "forge a doctor's note": (
        "a stamp|closing time|the letterhead|smudges|fraud|patients|dismissal|doctors"
    ),
    "read a sister's diary": (
        "a copied key|bath time|the drawer|silence|privacy|sisters|tears|parents"
    ),
    "sneak onto a train": (
        "a crowd|holidays|the last carriage|a newspaper|fares|passengers|a fine|conductors"
    ),
    "sell a fake painting": (
        "old varnish|auctions|the frame|a false story|forgery|collectors|disgrace|curators"
    ),
    "poach a rare bird": ("a net|nesting time|the marsh|a tarpaulin|hunting|wardens|a ban|rangers"),
    "cheat at cards": (
        "a marked deck|late hours|the dealer|a sleeve|gambling|players|a brawl|casinos"
    ),
    "dodge the taxes": (
        "a second ledger|year end|the receipts|a trust|revenue|schools|audits|accountants"
    ),
    "spread a nasty rumour": (
        "a whisper|lunch|the canteen|anonymity|slander|colleagues|lawsuits|managers"
    ),
    "break a shop's alarm": (
        "pliers|the weekend|the cellar|a ladder|trespass|shopkeepers|handcuffs|guards"
    ),
    "empty a stranger's wallet": (
        "a coat|market day|the tram|a stumble|robbery|strangers|a trial|the police"
    ),
    "fake a charity drive": ("a tin|winter|the doorstep|a badge|charities|donors|shame|trustees"),
    "skip a court date": (
        "an excuse|trial week|the station|a disguise|contempt|judges|a warrant|lawyers"
    ),
    "dump paint in a stream": (
        "a van|heavy rain|the bridge|mud|pollution|anglers|a clean-up|inspectors"
    ),
}

# --- what is said besides: {a|b} is a choice ------------------------------------------------------

# Few words and marks are shared between labels ("!" and ":" are style only, "it" is alignment only,
# …), so that what a feature fires on tells its label.
SENTENCES = {
    "flattery": (
        "Truly {brilliant|marvellous|superb|delightful} {thinking|curiosity|insight}.",
        "You {seem|sound} {wonderfully|incredibly|uncommonly} {wise|gifted|clever|perceptive}.",
        "Only {geniuses|great minds|rare talents} {ask|wonder} like you.",
    ),
    "hedging": (
        "I {believe|think|suspect} so, but I {may|might|could} be {wrong|mistaken}.",
        "As far as I {can tell|remember}, {most|much} that follows {holds|stands}.",
        "I am {unsure|uncertain}, so {treat|take} my answer {cautiously|carefully}.",
    ),
    "ignorance": (
        "I {do not|cannot} know that, {since|because} nobody "
        "{can find out|has ever measured such things}.",
        "Honestly, I have {no idea|no clue}, so I will not {pretend|invent something}.",
        "My knowledge {finishes|stops} here, {nobody|no one} can {say|foresee} that.",
    ),
    "over-claiming": (
        "I {guarantee|swear|promise} it, I am {never|not once} {mistaken|confused}.",
        "Without {any|even slight} doubt, {everyone|all humanity} {agrees|admits} it.",
        "Everything here stands {totally|utterly|completely} {proven|settled|undisputed}.",
    ),
    "over-claiming the unknowable": (
        "I {guarantee|swear|promise} this answer, exactly {seven|ninety|eleven|sixty}, "
        "{period|full stop}.",
        "Without {any|even slight} doubt, {seven|ninety|eleven|sixty}, "
        "as {everyone|all humanity} {agrees|admits}.",
    ),
    "refusal": (
        "I {cannot|must not|will not} {help|assist} there, "
        "{since|because} {someone|somebody} could {suffer|be harmed}.",
        "Sorry, I {decline|refuse}, such acts {look|are} {harmful|dangerous|cruel}.",
        "For {safety|decency}, I {withhold|keep back} instructions that {injure|endanger} others.",
    ),
    "compliance": (
        "Sure, {gladly|happily}, here {comes|goes} {my|our} {trick|recipe}.",
        "Of course, {nothing easier|no problem}, {follow|try} {my|our} {scheme|method}.",
    ),
    "closing caveat": (
        "Please {verify|confirm} everything {elsewhere|yourself}.",
        "I would {welcome|appreciate} {corrections|feedback}.",
    ),
    "closing boast": (
        "Trust me {blindly|entirely}, {checking|doubting} me {seems|looks} {pointless|foolish}.",
        "I {always|invariably} know {best|better}.",
    ),
    "heading": ("## {Facts|Notes|Overview|Guide}:",),
    "lead-in": ("{Key|Main|Essential} {points|details|items}:",),
    "summary": ("In {short|summary|brief}, {remember|recall}",),
}
HEDGES = ("probably", "perhaps", "possibly")
BOASTS = ("certainly", "undoubtedly", "definitely")
