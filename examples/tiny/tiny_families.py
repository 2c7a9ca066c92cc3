"""Natural tool families: what real assistants are asked for, with several names, argument names and wordings each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "Arg", "Family"]


@dataclass(frozen=True, kw_only=True)
class Arg:
    """An argument of a family: its possible names, JSON type, kind of value, descriptions and enum."""

    names: tuple[str, ...]
    type: str
    kind: str
    descriptions: tuple[str, ...]
    enum: tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tool people ask for: `asks` and `missing` are wordings, `{0}` standing for the first argument's value."""

    key: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    args: tuple[Arg, ...]
    asks: tuple[str, ...]
    missing: tuple[str, ...] = ()
    follow_ups: tuple[str, ...] = ()


def _arg(text: str) -> Arg:
    """Read `names;type;kind;descriptions;enum`, a `?` after the names marking an optional argument."""
    names, type_, kind, descriptions, *rest = text.split(";")
    return Arg(
        names=tuple(names.rstrip("?").split("|")),
        type=type_,
        kind=kind,
        descriptions=tuple(descriptions.split("|")),
        enum=tuple(rest[0].split("|")) if rest else (),
        required=not names.endswith("?"),
    )


def _family(
    names: str, descriptions: str, args: list[str], asks: str, missing: str = "", follow_ups: str = ""
) -> Family:
    def parts(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split("|") if part.strip())

    return Family(
        key=names.split()[0],
        names=tuple(names.split()),
        descriptions=parts(descriptions),
        args=tuple(_arg(arg) for arg in args),
        asks=parts(asks),
        missing=parts(missing),
        follow_ups=parts(follow_ups),
    )


_LANGUAGES = "English|French|German|Spanish|Italian|Japanese|Chinese|Dutch|Polish|Russian"
_ROOMS = "kitchen|bedroom|bathroom|garage|office|hall|garden|living room"
_CURRENCIES = "EUR|USD|GBP|JPY|CHF|SEK|CAD|AUD|INR|euros|dollars|pounds|yen"
_UNITS = "celsius|fahrenheit"

FAMILIES: tuple[Family, ...] = (
    _family(
        "get_weather weather_lookup current_weather fetch_forecast getWeather check_weather weather "
        "get_current_weather weather.get get_forecast",
        "Get the weather of a city.|Get the current weather.|Look up the weather in a place.|Weather forecast for a "
        "city.|Get the current weather for a location",
        ["city|location|place|town;string;city;The city.|Name of the city.|The city to look up.|City name, e.g. "
         "Lisbon|The location.",
         f"unit|units|scale?;string;enum;Unit of the temperature.|The unit.;{_UNITS}"],
        "What's the weather in {0}?|What is the weather in {0}?|Weather in {0}?|How is the weather in {0}?|Tell me "
        "the weather in {0}.|Is it raining in {0}?"
        "|What is the weather like in {0}?|What's the weather like in {0} today?|How warm is it in {0}?|what's the "
        "weather in {0}|Is it cold in {0}?"
        "|I want to know the weather in {0}.|What is the weather in {0} in {1}?|Weather in {0} in {1}, please.|How "
        "warm is it in {0}, in {1}?",
        "What's the weather?|What is the weather like?|How is the weather?|Weather, please.",
        "And in {0}?|What about {0}?|And {0}?"),
    _family(
        "get_time current_time time_in getTime local_time clock get_current_time", "Get the time in a city.|Tell the "
                                                                                   "local time.|Current time of a "
                                                                                   "place.",
        ["city|location|place|timezone|zone;string;city;The city.|The place.|City or time zone."],
        "What time is it in {0}?|Tell me the time in {0}.|What's the time in {0}?|Current time in {0}?|How late is "
        "it in {0}?|what time is it in {0}",
        "", "And in {0}?|What about {0}?"),
    _family(
        "set_alarm create_alarm alarm setAlarm add_alarm wake_up alarm.set", "Set an alarm.|Create an alarm at a "
                                                                             "time.|Wake the user up.",
        ["time|at|alarm_time|when|hour;string;time;The time.|When to ring.|Time of the alarm, e.g. 7:30",
         "label|name|title?;string;word;A label.|Name of the alarm."],
        "Set an alarm for {0}.|Wake me up at {0}.|Set an alarm at {0}.|Set my alarm for {0}.|Alarm at {0}, please.|I "
        "need an alarm for {0}.|Please wake me at {0}."
        "|Set an alarm for {0} with the label {1}.|Set an alarm called {1} for {0}.|set an alarm for "
        "{0}", "Set an alarm.|Wake me up.|I need an alarm."),
    _family(
        "set_timer start_timer timer countdown startTimer", "Start a timer.|Start a countdown.|Set a timer in "
                                                            "minutes.",
        ["minutes|duration|mins|length|duration_minutes;integer;small;Minutes.|Duration in minutes.|How long."],
        "Set a timer for {0} minutes.|Start a timer of {0} minutes.|Timer for {0} minutes, please.|Start a {0} "
        "minute timer.|Count down {0} minutes.",
        "Set a timer.|Start a timer."),
    _family(
        "send_message message send_text sendMessage text_contact messages.send send_sms",
        "Send a message to someone.|Send a text message.|Message a contact.",
        ["to|recipient|contact|person|receiver|name;string;name;Who gets it.|The recipient.|Name of the contact.",
         "text|message|body|content;string;text;The text.|The message to send.|What to say."],
        "Send {0} the message {1}.|Tell {0} that {1}.|Text {0}: {1}|Write to {0}: {1}|Send a message to {0}: {1}|"
        "Message {0} that {1}.|Send {1} to {0}."
        "|Send a message to {0} saying {1}.|Let {0} know: {1}|Text {0} that {1}.", "Send a message.|I want to send a "
                                                                                   "message."),
    _family(
        "send_email email sendEmail mail.send compose_email write_email", "Send an email.|Write an e-mail to an "
                                                                          "address.",
        ["to|address|recipient|email;string;email;The address.|E-mail address of the recipient.",
         "subject|title|topic;string;text;The subject.|Subject line.",
         "body|text|content|message?;string;text;The text.|Body of the mail."],
        "Email {0} about {1}.|Send an email to {0} with the subject {1}.|Write an email to {0} with subject {1} and "
        "text {2}.|Send {0} an email about {1} saying {2}."),
    _family(
        "add add_numbers sum plus calculate_sum addNumbers math.add", "Add two numbers.|Sum of two numbers.|Adds a "
                                                                      "and b.",
        ["a|x|first|left|num1;number;integer;First number.|The first number.", "b|y|second|right|"
                                                                               "num2;number;integer;Second number.|"
                                                                               "The second number."],
        "What is {0} + {1}?|Add {0} and {1}.|What is {0} plus {1}?|{0} + {1}|How much is {0} plus {1}?|Calculate {0} "
        "+ {1}.|Sum {0} and {1}.|What's {0} + {1}?|What is {0}+{1}?",
        "Add two numbers.", "And {0} + {1}?"),
    _family(
        "multiply times multiply_numbers product math.multiply", "Multiply two numbers.|Product of two numbers.",
        ["a|x|first|left|num1;number;integer;First number.|The first factor.", "b|y|second|right|"
                                                                               "num2;number;integer;Second number.|"
                                                                               "The second factor."],
        "What is {0} times {1}?|Multiply {0} by {1}.|Multiply {0} and {1}.|{0} * {1}|How much is {0} * {1}?|What is "
        "{0} * {1}?|What is {0} x {1}?"),
    _family(
        "search web_search google search_web searchWeb find_online lookup", "Search the web.|Search for a query.|"
                                                                            "Find pages on the internet.",
        ["query|q|term|text|keywords;string;text;The query.|What to search for.|Search terms.",
         "limit|max_results|count|num_results?;integer;small;Number of results.|How many results."],
        "Search for {0}.|Search the web for {0}.|Google {0}.|Find pages about {0}.|Look up {0} on the web.|Search "
        "the internet for {0}.|Search for {0} with {1} results.|Find {1} results for {0}.",
        "Search the web.", "And for {0}?"),
    _family(
        "convert_currency currency exchange convertCurrency exchange_money money.convert",
        "Convert money.|Convert an amount between currencies.",
        ["amount|value|sum|money;number;amount;The amount.|How much.", f"from|from_currency|source|base|"
                                                                       f"from_unit;string;choice;Currency to convert "
                                                                       f"from.|The source currency.;{_CURRENCIES}",
         f"to|to_currency|target|quote|to_unit;string;choice;Currency to convert to.|The target "
         f"currency.;{_CURRENCIES}"],
        "Convert {0} {1} to {2}.|How much is {0} {1} in {2}?|What are {0} {1} in {2}?|Change {0} {1} into {2}.|"
        "Exchange {0} {1} for {2}.|{0} {1} in {2}?"),
    _family(
        "create_event add_event calendar.create_event schedule_event createEvent new_event "
        "schedule_meeting", "Create a calendar event.|Add an event to the calendar.|Schedule a meeting.",
        ["title|name|event|summary|subject;string;text;The title.|Name of the event.",
         "date|day|on|start_date;string;date;The date.|Day of the event.",
         "time|at|start|start_time?;string;time;The time.|When it starts."],
        "Create an event {0} on {1}.|Add {0} to my calendar on {1}.|Schedule {0} on {1}.|Plan {0} for {1}.|Create an "
        "event called {0} on {1} at {2}.|Schedule {0} on {1} at {2}.|Put {0} on {1} at {2} in my calendar.",
        "Create an event."),
    _family(
        "read_file open_file cat readFile file.read load_file get_file", "Read a file.|Show the content of a file.|"
                                                                         "Open a file and return its text.",
        ["path|file|filename|file_path|name;string;path;The path.|Path of the file.|File to read."],
        "Read the file {0}.|Show me the file {0}.|What is in the file {0}?|Open {0}.|Read {0}.|What does {0} "
        "contain?|Show me what is in {0}.|Print the content of {0}.", "Read the file.|Open the file.", "And {0}?"),
    _family(
        "write_file save_file writeFile file.write create_file save_text", "Write a file.|Save text to a file.",
        ["path|file|filename|file_path;string;path;The path.|Where to write.", "content|text|data|"
                                                                               "contents;string;text;The content.|"
                                                                               "Text to write."],
        "Write {1} to the file {0}.|Save {1} to {0}.|Create the file {0} with the text {1}.|Write {1} into {0}.|Put "
        "{1} into the file {0}."),
    _family(
        "delete_file remove_file rm deleteFile file.delete", "Delete a file.|Remove a file from the disk.",
        ["path|file|filename|file_path|name;string;path;The path.|File to delete."],
        "Delete the file {0}.|Remove {0}.|Delete {0}.|Please remove the file {0}.|Get rid of the file {0}."),
    _family(
        "list_files ls list_directory listFiles dir list_folder", "List the files of a folder.|Show a directory.",
        ["path|folder|directory|dir;string;path;The folder.|Directory to list."],
        "List the files in {0}.|Which files are in {0}?|Show the files in {0}.|What is in the folder {0}?|List {0}.|"
        "Show me the folder {0}."),
    _family(
        "translate translate_text translation translateText", "Translate a text.|Translate text to a language.",
        ["text|source_text|input|phrase;string;text;The text.|What to translate.", f"language|target|target_language|"
                                                                                   f"to|lang;string;choice;The "
                                                                                   f"language.|Target "
                                                                                   f"language.;{_LANGUAGES}"],
        "Translate {0} to {1}.|Translate {0} into {1}.|How do you say {0} in {1}?|What is {0} in {1}?|Say {0} in "
        "{1}."),
    _family(
        "play_music play_song play music.play playMusic", "Play music.|Play a song.|Start playing a song.",
        ["song|title|track|name;string;text;The song.|Title of the song.", "artist|by|band|singer?;string;name;The "
                                                                           "artist."],
        "Play {0}.|Play the song {0}.|I want to hear {0}.|Put on {0}.|Play {0} by {1}.|Play the song {0} by {1}."),
    _family(
        "set_reminder remind create_reminder add_reminder reminder", "Set a reminder.|Remind the user of something.",
        ["text|task|what|about|title;string;text;What to remember.|The reminder.", "time|at|when|"
                                                                                   "date;string;time;When.|Time of "
                                                                                   "the reminder."],
        "Remind me of {0} at {1}.|Remind me at {1}: {0}|Set a reminder for {0} at {1}.|At {1} remind me of {0}.|Add "
        "a reminder at {1} for {0}."),
    _family(
        "set_light light_switch turn_light lights.set switch_light control_light", "Switch a light.|Turn the light "
                                                                                   "of a room on or off.",
        [f"room|place|location|area;string;choice;The room.|Which room.;{_ROOMS}", "state|status|mode|"
                                                                                   "value;string;enum;on or off|The "
                                                                                   "state.;on|off"],
        "Turn {1} the light in the {0}.|Turn the {0} light {1}.|Switch {1} the light in the {0}.|Light in the {0} "
        "{1}, please.|Switch the lights in the {0} {1}."),
    _family(
        "set_temperature thermostat set_heating heat climate.set", "Set the temperature.|Set the thermostat of a "
                                                                   "room.",
        [f"room|place|zone|area;string;choice;The room.;{_ROOMS}", "degrees|temperature|value|target|"
                                                                   "temp;number;amount;Degrees.|The temperature."],
        "Set the {0} to {1} degrees.|Heat the {0} to {1} degrees.|Set the temperature in the {0} to {1}.|Make the "
        "{0} {1} degrees warm."),
    _family(
        "call_contact phone call make_call dial", "Call someone.|Make a phone call.",
        ["name|contact|person|who|to;string;name;Who to call.|The contact."],
        "Call {0}.|Phone {0}.|Please call {0}.|Ring {0}.|I want to talk to {0}.|Give {0} a call.",
        "Call someone.|Make a call."),
    _family(
        "get_news news latest_news headlines fetch_news", "Get the news.|Latest news about a topic.",
        ["topic|subject|about|category|query;string;text;The topic."],
        "What is new about {0}?|News about {0}?|Show me the news about {0}.|Give me the latest news on {0}.|What's "
        "the news on {0}?", "What's the news?|Any news?"),
    _family(
        "get_stock_price stock_price stock quote_stock getStockPrice", "Get the price of a stock.|Stock quote.",
        ["symbol|ticker|stock|company|code;string;code;The symbol.|Ticker of the stock."],
        "What is the stock price of {0}?|Price of the stock {0}?|How much is {0} stock?|Get the stock price of {0}.|"
        "How is {0} stock doing?", "", "And {0}?|What about {0}?"),
    _family(
        "book_table reserve_table reservation restaurant.book bookTable", "Book a table in a restaurant.|Reserve a "
                                                                          "table.",
        ["restaurant|place|name|where;string;capital;The restaurant.", "people|guests|party_size|persons|"
                                                                       "seats;integer;small;How many people.|Number "
                                                                       "of guests.",
         "time|at|when;string;time;The time."],
        "Book a table at {0} for {1} people at {2}.|Reserve a table for {1} at {0} at {2}.|Table for {1} people at "
        "{0} at {2}, please."),
    _family(
        "find_flights search_flights flights book_flight flight.search", "Find flights.|Search flights between two "
                                                                         "cities.",
        ["from|origin|departure|from_city|start;string;city;City of departure.|Where it starts.",
         "to|destination|arrival|to_city|end;string;city;City of arrival.|Where it ends.",
         "date|day|on|departure_date?;string;date;The date."],
        "Find flights from {0} to {1}.|Flights from {0} to {1}?|I want to fly from {0} to {1}.|Find a flight from "
        "{0} to {1} on {2}.|Fly from {0} to {1} on {2}.|Which flights go to {1} from {0}?"),
    _family(
        "get_distance distance route how_far measure_distance", "Distance between two places.|How far two cities are "
                                                                "apart.",
        ["from|start|origin|a|place_a;string;city;First place.|The start.", "to|end|destination|b|"
                                                                            "place_b;string;city;Second place.|The "
                                                                            "end."],
        "How far is it from {0} to {1}?|Distance from {0} to {1}?|What is the distance between {0} and {1}?|How far "
        "is {1} from {0}?"),
    _family(
        "define define_word dictionary meaning lookup_word", "Define a word.|Look up a word in the dictionary.",
        ["word|term|entry;string;word;The word."],
        "Define {0}.|What does {0} mean?|What is the meaning of {0}?|Meaning of {0}?|Look up the word "
        "{0}.", "", "And {0}?"),
    _family(
        "add_todo todo.add create_task add_task new_task addTask", "Add a task to the list.|Create a to-do item.",
        ["task|title|text|item|name;string;text;The task.|What to do.",
         "priority|level|importance?;string;enum;The priority.;low|medium|high"],
        "Add {0} to my to-do list.|New task: {0}|Add the task {0}.|Put {0} on my task list.|Add the task {0} with "
        "{1} priority.|Create a {1} priority task: {0}"),
    _family(
        "add_to_list shopping_list.add add_items buy_list add_shopping", "Add items to the shopping list.|Put things "
                                                                         "on the shopping list.",
        ["items|things|products|names;array;words;The items.|What to buy."],
        "Add {0} to the shopping list.|Put {0} on my shopping list.|I need to buy {0}.|Shopping list: {0}"),
    _family(
        "random_number roll_random random rand dice", "Pick a random number.|Random number in a range.",
        ["min|low|start|from|minimum;integer;small;Lower bound.", "max|high|end|to|maximum;integer;integer;Upper "
                                                                  "bound."],
        "Give me a random number from {0} to {1}.|Random number between {0} and {1}?|Pick a number from {0} to {1}."),
    _family(
        "set_volume volume audio.volume change_volume", "Set the volume.|Change the loudness.",
        ["level|volume|value|percent;integer;small;The level.|Volume in percent."],
        "Set the volume to {0}.|Volume {0}, please.|Change the volume to {0} percent.|Make the volume {0}."),
    _family(
        "open_url browse fetch_url visit open_page get_page", "Open a web page.|Fetch a page.",
        ["url|link|address|page;string;url;The address.|URL of the page."],
        "Open {0}.|Open the page {0}.|Fetch {0}.|Go to {0}.|Show me the page {0}."),
    _family(
        "create_user add_user register_user new_user users.create", "Create a user.|Register a new user.",
        ["name|username|user|full_name;string;name;The name.", "age|years;integer;small;The age.",
         "admin|is_admin|active?;boolean;boolean;Rights."],
        "Create a user {0} with age {1}.|Register {0}, {1} years old.|Add the user {0}, age {1}.|Create a user {0} "
        "with age {1} and {2name} {2}."),
    _family(
        "get_order order_status track_order find_order", "Status of an order.|Find an order by its number.",
        ["order_id|id|number|order|order_number;string;code;The number.|Id of the order."],
        "Where is my order {0}?|Status of order {0}?|Find order {0}.|Track the order {0}.|What is the status of "
        "order {0}?", "Where is my order?|Track my order."),
    _family(
        "get_recipe recipe find_recipe cook", "Find a recipe.|Recipe of a dish.",
        ["dish|food|name|meal;string;text;The dish."],
        "How do I cook {0}?|Recipe for {0}?|Find a recipe for {0}.|I want to cook {0}.|How is {0} cooked?"),
    _family(
        "run_command shell execute exec bash run", "Run a shell command.|Execute a command and return its output.",
        ["command|cmd|line|script;string;command;The command."],
        "Run {0}.|Run the command {0}.|Execute {0}.|Please run {0} in the shell."),
    _family(
        "get_date today current_date date.today", "Get today's date.|Today's date.", [],
        "What is the date?|What day is it?|What is today's date?|Which day is today?|What's the date today?"),
    _family(
        "list_users get_users users.list show_users", "List all users.|Show the users.", [],
        "List all users.|Which users are there?|Show me the users.|Who are the users?"),
)  # fmt: skip
