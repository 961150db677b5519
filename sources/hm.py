"""H&M purchases as Kaggle gives them out: a folder with three things; the first is needed.

transactions_train.csv   t_dat (YYYY-MM-DD), customer_id, article_id; no more is read
articles.csv             article_id, prod_name and, where present, detail_desc and the names of
                         type, group and colour
images/                  <first 3 digits>/<article_id>.jpg; the folder may be a link, have a longer
                         name (images_128_128), or lie in itself (images/images)

Both tables may be compressed (.csv.gz). An article id has ten digits, the first of them a zero
that spreadsheets lose. Its first seven digits are the product, whose colours the articles are;
`by` says which of the two is the item. Source:
https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations (asks for a
login).
"""
import glob
import os
import re
from array import array
from datetime import datetime
from functools import lru_cache

import numpy as np

from common.files import UserError
from common.items import notes_of_undescribed
from common.tables import Keys, Raw, clean_text, each_row, placed, sentences

NAMES = ("hm",)
DIGITS = {"article": 10, "product": 7}    # how much of the article id is the item's key
BY = tuple(DIGITS)
PAGE = "https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations/data"
SALES, ARTICLES = "transactions_train.csv", "articles.csv"
CATEGORY = ("product_type_name", "product_group_name", "garment_group_name", "index_name")
LOOK = ("graphical_appearance_name", "colour_group_name")
UNKNOWN = {"", "nan", "unknown", "undefined"}
ARTICLE = re.compile(r"[0-9]{9,10}")
FOLDERS = ("images*/*/*", "images*/images*/*/*")
PICTURE = re.compile(r"(.*)/[0-9]{3}/([0-9]{10})\.(jpg|jpeg|png)", re.IGNORECASE)
MAX_IMAGES = 10
DAY = 86_400


def recognises(folder) -> bool:
    return placed(folder, SALES) is not None


def fetch(name, raw, mirror):
    """The folder `raw` with the tables that were put there by hand. Raises UserError."""
    missing = [table for table in (SALES, ARTICLES) if not placed(raw, table)]
    if missing:
        raise UserError(
            f"{name} asks for a login and cannot be downloaded from here: get "
            f"{' and '.join(missing)} and, for the pictures, the folder images from {PAGE} and put "
            f"them into {raw.resolve()}"
        )
    return raw


def read(folder, name, by="article") -> Raw:
    """The purchases in a folder, by article or product, with texts and pictures of what was sold.

    The whole set, asked for by name, has some 300 purchases an article and is cut to its 5-core. A
    folder is taken as it is: in a sample of the customers an article has one or two purchases, and
    a 5-core would leave next to nothing.

    Raises UserError for a table that lacks a column, is damaged, or has more than 1 % unusable
    lines.
    """
    digits = DIGITS[by]
    sales = placed(folder, SALES)
    users, sold_articles, times, counts = read_sales(sales)
    report = {sales.name: counts}
    items = sold_articles
    if by == "product":
        items = sold_articles.renamed(lambda article: article[:digits])
    sold = items.names
    images, others = find_images(folder, sold, digits)
    texts = {}
    articles = placed(folder, ARTICLES)
    if articles:
        texts, report[articles.name] = read_articles(articles, sold, digits)
    catalog = {}
    for item in sold:
        if item in texts or item in images:
            words = texts.get(item, {"title": "", "text": []})
            catalog[item] = {**words, "language": "en", "images": images.get(item, [])}
    report["items_without_metadata"] = len(sold) - len(texts)
    report["items_without_picture"] = len(sold) - len(images)
    notes = []
    if not images:
        notes.append("no picture of an article was found under images/NNN/NNNNNNNNNN.jpg")
    elif others:
        notes.append(
            f"{len(others)} pictures are of no article that was sold, or are not called "
            f"images/NNN/NNNNNNNNNN.jpg, the first is {others[0]}"
        )
    if articles and not name:
        notes += notes_of_undescribed(sold, texts, articles.name)
    return Raw(
        users, items, times, catalog,
        report=report,
        notes=notes,
        clock="day",
        core=5 if name else 0,
        variants=sold_articles if by == "product" else None,
        image_root=str(folder.resolve()),
    )


def read_sales(path) -> tuple:
    """-> users, articles, times, counts."""
    users, sold, times = Keys(), Keys(), array("q")
    articles = {}    # article as it is written -> as it is known, "" for none

    def take(day, customer, article):
        if customer not in users.names:
            customer = " ".join(customer.split())
        if not customer:
            return "no_customer"
        item = articles.get(article)
        if item is None:
            item = articles[article] = article_id(article)
        if not item:
            return "no_article"
        time = seconds(day)
        if time is None:
            return "no_day"
        users.add(customer)
        sold.add(item)
        times.append(time)

    counts = each_row(path, ("t_dat", "customer_id", "article_id"), take)
    short = [text for text, item in articles.items() if item and len(text.strip()) < 10]
    counts["article_ids_without_their_zero"] = len(short)
    return users, sold, np.asarray(times), counts


def read_articles(path, sold, digits) -> tuple:
    """-> {sold item: title and text}, counts.

    A product has the words of its first article and the looks of all.
    """
    texts, looks = {}, {}
    seen = set()

    def take(article, title, description, *names):
        article = article_id(article)
        if not article:
            return "no_article"
        item = article[:digits]
        if item in sold and article not in seen:
            category, look = names[:len(CATEGORY)], names[len(CATEGORY):]
            if item not in texts:
                texts[item] = {
                    "title": known(title),
                    "text": [known(description), listed(category)],
                }
            looks.setdefault(item, []).extend(look)
        seen.add(article)

    counts = each_row(
        path, ("article_id", "prod_name"), take, ("detail_desc", *CATEGORY, *LOOK)
    )
    for item, words in texts.items():
        words["text"] = sentences(*words["text"], listed(looks[item]))
    good = counts["lines"] - sum(counts["bad_lines"].values())
    counts["articles"] = len(seen)
    counts["duplicate_articles"] = good - len(seen)
    return texts, counts


def picture_files(folder) -> list:
    """Paths, from the folder, of what may be pictures."""
    paths = [path for form in FOLDERS for path in glob.glob(form, root_dir=folder)]
    return sorted(path.replace(os.sep, "/") for path in paths)


def pictures_in(folder) -> int:
    """How many files lie in the picture folders, which may come after the tables."""
    return len(picture_files(folder))


def find_images(folder, sold, digits) -> tuple:
    """(sold item -> paths of its articles' pictures, in the articles' order, at most MAX_IMAGES;
    paths of pictures of nothing that was sold)"""
    images, others = {}, []
    found_in = {}    # article -> folder; a second one may have the same pictures in another size
    for path in picture_files(folder):
        match = PICTURE.fullmatch(path)
        if not match or match[2][:digits] not in sold:
            others.append(path)
            continue
        if found_in.setdefault(match[2], match[1]) != match[1]:
            continue
        paths = images.setdefault(match[2][:digits], [])
        if len(paths) < MAX_IMAGES:
            paths.append(path)
    return images, others


def article_id(text) -> str:
    """The ten digits of an article id that may have lost its zero; "" for what is no article id."""
    text = text.strip()
    return text.zfill(10) if ARTICLE.fullmatch(text) else ""


@lru_cache(maxsize=4096)    # two years have few days
def seconds(day):
    """Seconds from 1970 to the beginning of a day; None for what is no date since then."""
    try:
        moment = datetime.fromisoformat(day.strip())
    except ValueError:
        return None
    days = moment.toordinal() - datetime(1970, 1, 1).toordinal()
    return days * DAY if days >= 0 else None


@lru_cache(maxsize=1 << 16)    # the same names stand in line after line
def known(text) -> str:
    text = clean_text(text)
    return "" if text.casefold() in UNKNOWN else text


def listed(names) -> str:
    """The known names in a row, each once however it writes its case and its "and"."""
    distinct = {}
    for name in filter(None, map(known, names)):
        distinct.setdefault(name.casefold().replace("&", "and"), name)
    return ", ".join(distinct.values())
