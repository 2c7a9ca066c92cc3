"""Words and values the synthetic conversations are filled with, a tenth of them held out of training."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

__all__ = ["ADJECTIVES", "ARG_NAMES", "CITIES", "NAMES", "NOUNS", "Words", "is_held_out"]

NAMES = (
    "Anna Bob Carla David Emma Frank Grace Henry Ivan Julia Karen Liam Maria Nora Oscar Paul Quinn Rosa Sam Tina Uma "
    "Victor Wendy Xavier Yara Zoe Alice Peter John Mike Sarah Lucy Tom Jane Mark Lisa Ben Clara Dan Eva Fred Gina "
    "Hugo "
    "Iris Jack Kate Leo Mia Nick Olga Pia Ralf Sven Tara Chris Laura Steve Mom Dad Max Ella James Sophie Daniel Elena"
).split()
CITIES = [
    *"Paris London Rome Berlin Madrid Vienna Oslo Tokyo Boston Chicago Dublin Lisbon Prague Warsaw Athens Cairo Delhi "
    "Sydney Toronto Denver Austin Miami Seattle Geneva Munich Hamburg Milan Naples Venice Porto Seville Lyon Nice "
    "Brussels Amsterdam Helsinki Stockholm Copenhagen Budapest Istanbul Moscow Beijing Shanghai Seoul Bangkok "
    "Nairobi "
    "Lagos Lima Bogota Havana Zürich Köln München Málaga Göteborg Kraków Montréal Reykjavík Düsseldorf Łódź Houston "
    "Bristol Leeds Turin Dallas Osaka Kyoto Mumbai Dubai Singapore".split(),
    "New York",
    "San Francisco",
    "Los Angeles",
    "São Paulo",
    "Buenos Aires",
    "Rio de Janeiro",
    "Hong Kong",
]
NOUNS = (
    "apple bread milk butter cheese tomato potato onion garlic banana orange lemon coffee tea water juice rice pasta "
    "soup salad pizza cake sugar salt pepper chair table lamp window door kitchen bedroom garden garage office "
    "school "
    "market station airport bridge river mountain forest island beach desert valley castle tower museum library "
    "theater hotel bank shop factory farm house street village country letter book paper pencil notebook camera "
    "phone computer screen keyboard printer battery engine wheel bicycle car truck train boat plane rocket planet "
    "star moon cloud storm wind summer winter music song movie story game puzzle ball guitar piano violin drum dog "
    "cat horse bird fish rabbit tiger lion bear wolf fox mouse snake spider frog turtle shirt jacket shoe hat glove "
    "sock ring watch mirror bottle cup plate knife spoon basket box bag key coin ticket map flag candle doctor "
    "teacher "
    "farmer driver writer singer lawyer nurse pilot artist meeting report project budget invoice contract lesson "
    "dinner lunch breakfast birthday wedding party holiday picnic concert match race review deadline call visit"
).split()
ADJECTIVES = (
    "red blue green yellow black white small large old new quick slow bright dark quiet loud warm cold soft hard "
    "simple fresh sweet sour clean broken empty full early late happy sad brave calm clever kind lazy proud shy "
    "silver golden wooden round square narrow wide heavy light strange famous final urgent weekly daily secret"
).split()
ARG_NAMES = (
    "name title id code key label tag type kind mode status state level color size width height depth weight length "
    "price cost amount total quantity count limit offset page rate score rank priority date time start end deadline "
    "duration days hours year month day city country region street zip address place room floor building path file "
    "folder source target origin destination from to url link host port user username owner author editor manager "
    "member team group company email phone contact subject message text body note comment description summary reason "
    "category topic language format unit currency model brand version branch query pattern filter order field column "
    "table index value data items tags ids options settings enabled active public urgent verbose force recursive"
).split()
_VERBS = (
    "bring buy call check clean close fix find finish join leave meet move open paint send start visit wash"
).split()
_ONSETS = "b br c ch cl d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t th tr v w x y z".split()
_VOWELS = "a e i o u a e i o ai ea ee io ou oa y".split()
_CODAS = "- - - - - - - - - - b ck d g k l ll m n nd ng nt p r rd rk s sh st t th x z".split()
_LATIN = "àáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿßāăąćčďđēęěğīłńňőœřśşšťūůűźżž"
_CJK = (
    "東京北上海大阪名古屋中国日本山川田水火木金土人口天空花鳥風月春夏秋冬学校音楽電車新聞"
    "明子龙马书店茶饭家门车你好世界早安서울부산한국사랑"
)
_OTHER = "абвгдежзиклмнопрстухшяαβγδεθκλμνπρστφω"
_EMOJI = "😀🎉🚀🌧☀❤👍🍕🐱🎂°€£½"


def is_held_out(word: str) -> bool:
    """True for the tenth of all words, chosen by hash, that training never uses as a free value."""
    return zlib.crc32(word.lower().encode()) % 10 == 0


class Words:
    """A source of random words and values; `held_out` makes every free word one that training never used."""

    def __init__(self, rng: random.Random, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out

    def _draw(self, make: Callable[[], str] | Sequence[str]) -> str:
        for _ in range(400):
            word = make() if callable(make) else self.rng.choice(make)
            if is_held_out(word) == self.held_out:
                return word
        raise AssertionError("no word of the wanted half was found")

    def _pseudo(self) -> str:
        rng = self.rng
        word = ""
        for _ in range(rng.choice((1, 2, 2, 2, 2, 3))):
            word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS).strip("-")
        return word if len(word) > 2 else word + rng.choice("nrstl") + rng.choice("aeiou")

    def _foreign(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.25:
            return "".join(rng.choice(_CJK) for _ in range(rng.randint(1, 4)))
        if kind < 0.35:
            return "".join(rng.choice(_OTHER) for _ in range(rng.randint(3, 7)))
        letters = list(self._pseudo())
        for _ in range(rng.choice((1, 1, 2))):
            letters.insert(rng.randrange(len(letters) + 1), rng.choice(_LATIN))
        return "".join(letters)

    def pseudo(self) -> str:
        """A pronounceable word that exists in no language, in ASCII."""
        return self._draw(self._pseudo)

    def word(self) -> str:
        """One lower-case word: mostly English or invented, a tenth with letters beyond ASCII."""
        kind = self.rng.random()
        if kind < 0.1:
            return self._draw(self._foreign)
        if kind < 0.45:
            return self._draw(self._pseudo)
        return self._draw(NOUNS if kind < 0.85 else ADJECTIVES)

    def name(self) -> str:
        """A person's name, known or invented."""
        kind = self.rng.random()
        if kind < 0.5:
            return self._draw(NAMES)
        first = self.capital()
        return f"{first} {self.capital()}" if kind > 0.9 else first

    def capital(self) -> str:
        """An invented capitalised word."""
        word = self._draw(self._foreign if self.rng.random() < 0.12 else self._pseudo)
        return word[0].upper() + word[1:] if len(word[0].upper()) == 1 else word

    def city(self) -> str:
        """A city, known or invented, sometimes of two words."""
        kind = self.rng.random()
        if kind < 0.5:
            return self._draw(CITIES)
        first = self.capital()
        return f"{self.rng.choice(('New', 'San', 'Port', 'Bad', 'El', 'St.'))} {first}" if kind > 0.93 else first

    def phrase(self, low: int = 2, high: int = 5) -> str:
        """Several words, like a short message or title; never the words `and`, `with` or `to`."""
        rng = self.rng
        style = rng.random()
        if style < 0.25:
            text = f"{rng.choice(_VERBS)} the {self.word()}"
        elif style < 0.4:
            text = f"{rng.choice(ADJECTIVES)} {self.word()}"
        elif style < 0.5:
            text = rng.choice(
                (
                    "I'm late",
                    "it's {}",
                    "see you at {}",
                    "I love {}",
                    "don't forget the {}",
                    "happy {}",
                    "call me",
                    "I am {}",
                )
            ).format(self.word())
        else:
            text = " ".join(self.word() for _ in range(rng.randint(low, rng.randint(low, high))))
        if rng.random() < 0.2:
            text = text[0].upper() + text[1:]
        if rng.random() < 0.03:
            text += " " + rng.choice(_EMOJI)
        return text

    def code(self) -> str:
        """An identifier such as `AB-1234`, `x7q9` or `48213`."""
        rng = self.rng
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
        mixed = "".join(rng.choice("abcdefghkmnpqrstuvwxyz0123456789") for _ in range(rng.randint(4, 7)))
        return rng.choice((f"{letters}-{digits}", letters + digits, mixed, digits, letters + "ABXY"[rng.randrange(4)]))

    def date(self) -> str:
        """A date: mostly ISO, also `tomorrow`, `Monday` and `3 May`."""
        rng = self.rng
        if rng.random() < 0.6:
            return f"{rng.randint(1990, 2039)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow".split()
        months = "January February March April May June July August September October November December".split()
        return rng.choice(days) if rng.random() < 0.6 else f"{rng.randint(1, 28)} {rng.choice(months)}"

    def time(self) -> str:
        """A time of day such as `7:30`, `07:05`, `7am` or `6 pm`."""
        rng = self.rng
        hour, minute = rng.randint(0, 23), rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50, rng.randint(0, 59)))
        return rng.choice(
            (
                f"{hour}:{minute:02d}",
                f"{hour:02d}:{minute:02d}",
                f"{rng.randint(1, 12)}{rng.choice(('am', 'pm'))}",
                f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}",
                f"{rng.randint(1, 12)}:{minute:02d} {rng.choice(('am', 'pm'))}",
            )
        )

    def path(self) -> str:
        """A file path or file name."""
        rng = self.rng
        parts = [self.rng.choice((self.pseudo, self.word))() for _ in range(rng.choice((1, 1, 2, 3)))]
        suffix = rng.choice((".txt", ".md", ".py", ".json", ".csv", ".log", ".pdf", ""))
        return rng.choice(("", "", "/", "/home/", "/tmp/", "./", "docs/", "src/", "~/")) + "/".join(parts) + suffix

    def email(self) -> str:
        """An e-mail address."""
        return f"{self.pseudo()}@{self.pseudo()}.{self.rng.choice(('com', 'org', 'net', 'io'))}"

    def url(self) -> str:
        """A web address."""
        tail = self.rng.choice(("", "", f"/{self.pseudo()}"))
        start = self.rng.choice(("https://", "http://", "https://www."))
        return f"{start}{self.pseudo()}.{self.rng.choice(('com', 'org', 'net', 'io'))}{tail}"

    def integer(self) -> int:
        """An integer, mostly small, sometimes negative."""
        rng = self.rng
        limit = rng.choice((9, 20, 99, 99, 999, 9999, 99999))
        return rng.randint(-limit, -1) if rng.random() < 0.06 else rng.randint(0, limit)

    def number(self) -> int | float:
        """An integer or a decimal number."""
        rng = self.rng
        return (
            self.integer()
            if rng.random() < 0.4
            else round(rng.uniform(0, rng.choice((1, 10, 100, 1000))), rng.choice((1, 2)))
        )
