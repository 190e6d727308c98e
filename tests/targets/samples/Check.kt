// What tests/targets/test_samples_android.py runs of the Kotlin classes: a line for each check, "name<tab>what it found".
package check

import dev.moec.Constraint
import dev.moec.Conversation
import dev.moec.End
import dev.moec.Message
import dev.moec.MoecException
import dev.moec.MoecModel
import dev.moec.OnFull
import dev.moec.Part
import dev.moec.Settings
import java.io.File
import java.util.concurrent.atomic.AtomicBoolean
import kotlin.concurrent.thread

fun say(name: String, found: Any?) = System.err.println("$name\t$found".replace("\n", "\\n"))

fun text(conversation: Conversation, prompt: String, settings: Settings): String {
    val found = StringBuilder()
    conversation.continueText(prompt, settings) { found.append(it); true }
    return found.toString()
}

fun refused(name: String, call: () -> Unit) = try {
    call()
    say(name, "not refused")
} catch (fault: RuntimeException) {
    say(name, "${fault::class.simpleName}: ${fault.message}")
}

/** Only these tokens, one after the other. */
class Only(private val tokens: List<Int>) : Constraint {
    private var at = 0

    override fun allowed(mask: IntArray) {
        val token = tokens[at]
        mask[token / 32] = mask[token / 32] or (1 shl token % 32)
    }

    override fun take(token: Int): Boolean {
        check(token == tokens[at])
        at += 1
        return at == tokens.size
    }
}

/** Calls `read` whenever it is read, which answers do before there is a generation. */
class Watched<T>(private val items: List<T>, private val read: () -> Unit) : AbstractList<T>() {
    override val size get() = items.size
    override fun get(index: Int): T = items[index].also { read() }
}

fun main(arguments: Array<String>) {
    val (folder, kept, prompt) = arguments
    val model = MoecModel(File(folder), threads = 1)
    say("info", listOf(model.info.vocabulary, model.info.context, model.info.threads, model.info.hasChat, model.info.hasTools))
    say("recommended", with(model.recommended) { listOf(temperature, topK, topP, minP, repeatPenalty, presencePenalty, frequencyPenalty) })

    val all = Settings(
        limit = 40, temperature = 0.9, topK = 50, topP = 0.95, minP = 0.001, repeatPenalty = 1.1, presencePenalty = 0.2,
        frequencyPenalty = 0.1, biases = mapOf(5 to 2.0, 7 to Double.NEGATIVE_INFINITY), seed = -3, speculate = false,
    )
    val first = model.conversation()
    say("all", text(first, prompt, all))
    val sampled = Settings(limit = 40, temperature = 0.9, seed = 7)
    say("sampled", text(first, prompt, sampled))
    val whole = text(first, prompt, sampled)
    val stop = whole.substring(15, 18)
    say("stops", text(first, prompt, sampled.copy(stops = listOf("never \u0020said", stop))) == whole.substringBefore(stop))

    // sessions
    first.save(File(kept))
    val second = model.conversation()
    second.restore(File(kept))
    val forked = first.fork()
    say("kept", second.tokens.contentEquals(first.tokens) && forked.tokens.contentEquals(first.tokens))
    first.rewind(2)
    say("rewound", first.tokens.size == 2 && forked.tokens.size > 2)
    val stats = second.continueText(prompt, sampled.copy(limit = 3)) { true }
    say("stats", listOf(stats.end, stats.newTokens, stats.reusedTokens == stats.promptTokens - 1, stats.isWhole))
    val scored = second.continueText(prompt, sampled.copy(limit = 3, topScores = 2)) { true }.scores
    say("scores", scored.map { one -> listOf(one.taken, *one.likeliest.toTypedArray()).map { it.token } })
    say("likely", scored.joinToString(" ") { "%.9f".format(java.util.Locale.ROOT, it.taken.logProbability) })
    say("scored", scored.last().textBytes == scored.maxOf { it.textBytes } && stats.scores.isEmpty())
    val texts = arrayOfNulls<String>(3)
    listOf(first, second, forked).mapIndexed { i, each -> thread { texts[i] = text(each, prompt, sampled) } }.forEach { it.join() }
    say("threads", texts.all { it == whole })

    // ends
    var pieces = 0
    say("given up", first.continueText(prompt, sampled) { pieces += 1; false }.end.toString() + pieces)
    val stopper = thread(start = false) { Thread.sleep(20); first.stop() }
    say("stopped", first.continueText(prompt, Settings(limit = 100_000)) { if (!stopper.isAlive) runCatching { stopper.start() }; true }.end)
    val stopElsewhere = { thread { first.stop() }.join() }
    val unending = Settings(onFull = OnFull.DROP_OLDEST, fit = true)
    val hello = listOf(Message("user", "Hi"))
    val stoppedEarly = listOf(
        first.answer(Watched(hello, stopElsewhere), unending) { false },
        first.answerInParts(Watched(hello, stopElsewhere), null, unending) { false },
        first.continueText(prompt, unending.copy(stops = Watched(listOf("never"), stopElsewhere))) { false },
    )
    say("stopped early", stoppedEarly.map { "${it.end}${it.newTokens}" })
    val afterStops = listOf<() -> End>(
        { first.answer(hello, Settings(limit = 1)) { true }.end },
        { first.answerInParts(hello, null, Settings(limit = 1)) { true }.end },
        { first.continueText(prompt, Settings(limit = 1)) { true }.end },
    )
    say("stopped before", afterStops.map { first.stop(); it() })
    refused("thrown") { first.continueText(prompt, sampled) { throw IllegalStateException("mine") } }
    say("goes on", text(first, prompt, sampled) == whole)

    // constraints
    val wanted = model.tokenize(" a \uD83D\uDE42 b", plain = true).toList()
    val answer = StringBuilder()
    val followed = first.continueText(prompt, sampled.copy(constraint = Only(wanted))) { answer.append(it); true }
    say("constrained", listOf(followed.end, followed.isWhole, answer.toString() == model.textOf(wanted.toIntArray())))
    refused("constraint") {
        first.continueText(prompt, sampled.copy(constraint = object : Constraint {
            override fun allowed(mask: IntArray) = throw UnsupportedOperationException("mine too")
            override fun take(token: Int) = false
        })) { true }
    }
    refused("nothing allowed") {
        first.continueText(prompt, sampled.copy(constraint = object : Constraint {
            override fun allowed(mask: IntArray) = Unit
            override fun take(token: Int) = false
        })) { true }
    }

    // parts: a conversation, thinking told from text, and nothing after `each` said no
    val messages = listOf(Message("system", "Be brief."), Message("user", "Name a \uD83D\uDE42 city."))
    val spoken = StringBuilder()
    first.answer(messages, Settings(limit = 30, temperature = 0.9, seed = 5)) { spoken.append(it); true }
    say("answer", spoken)
    val parts = mutableListOf<Part>()
    first.answerInParts(messages, null, Settings(limit = 30, temperature = 0.9, seed = 5)) { parts.add(it) }
    say("parts", parts.all { it is Part.Text } && parts.joinToString("") { (it as Part.Text).text } == spoken.toString())
    var told = 0
    first.answerInParts(messages, null, Settings(limit = 30, temperature = 0.9, seed = 5)) { told += 1; false }
    say("told", told)
    val tools = """[{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"n": 1.5}}}]"""
    val calls = listOf(
        Message("user", "Hi"), Message("assistant", "", listOf(Part.Call("f", """{"n": 2}"""))), Message("tool", "two"),
    )
    val long = StringBuilder()
    first.answerInParts(calls, tools, Settings(limit = 8)) { long.append(if (it is Part.Text) it.text else it.toString()); true }
    say("tools", long)

    // a full context
    val question = Message("user", "Name a city. ".repeat(150))
    val many = listOf(messages[0], question, Message("assistant", "Rome."), question, Message("assistant", "Ulm."), messages[1])
    refused("too long") { first.answer(many) { true } }
    val fitting = StringBuilder()
    val fitted = first.answer(many, Settings(limit = 30, temperature = 0.9, seed = 5, fit = true)) { fitting.append(it); true }
    say("fit", listOf(fitted.droppedMessages, fitting.toString() == spoken.toString()))
    val endless = first.continueText(prompt, Settings(limit = 600, onFull = OnFull.DROP_OLDEST, keepFirst = 5)) { true }
    say("endless", listOf(endless.newTokens > 500L || endless.isWhole, endless.droppedTokens > 200L, first.tokens.size <= 512))

    // beginnings that are kept, and drafts
    model.keepPrefixesIn(File("$kept.prefixes"))
    val begun = listOf(1, 2).map { model.conversation().use { it.prepare("start", "Be brief.", tools).reusedTokens } }
    say("prepared", listOf(begun[0] == 0L, begun[1] == model.prefixTokens("start"), begun[1] > 20L, model.prefixWarning.isEmpty()))
    val begins = listOf(messages[0]) + calls
    say("begun", model.conversation().use { it.answerInParts(begins, tools, Settings(limit = 8)) { true }.reusedTokens } == begun[1])
    refused("name") { first.keepPrefix("a/b") }
    say("forgotten", listOf(model.forgetPrefix("start"), model.forgetPrefix("start")))
    val done = AtomicBoolean()
    val stops = thread { while (!done.get()) first.stop() }
    var cut: End
    var tries = 0
    do { // until the other thread was as fast
        model.forgetPrefix("start")
        first.rewind(0)
        cut = first.prepare("start", "Be brief.", tools).end
    } while (cut != End.CANCELLED && ++tries < 300)
    done.set(true)
    stops.join()
    say("stopped prefix", listOf(cut, model.prefixTokens("start"), first.prepare("start", "Be brief.", tools).end))
    model.keepPrefixesIn(null)
    val drafting = model.conversation()
    say("draft", text(first, prompt, sampled.copy(draft = drafting)) == whole && drafting.tokens.isNotEmpty())
    drafting.close()

    // faults
    refused("zero") { first.answer(listOf(Message("user", "a\u0000b"))) { true } }
    refused("role") { first.answer(listOf(Message("nobody", "Hi"))) { true } }
    refused("top p") { first.continueText(prompt, Settings(topP = 1.5)) { true } }
    refused("not a number") { first.continueText(prompt, Settings(temperature = Double.NaN)) { true } }
    refused("bias") { first.continueText(prompt, Settings(biases = mapOf(100_000_000 to 1.0))) { true } }
    refused("definitions") { first.answerInParts(messages, "[] x") { true } }
    refused("folder") { MoecModel(File("not \uD83D\uDE42 here")) }
    listOf(first, second, forked).forEach { it.close() }
    first.stop()
    refused("closed") { text(first, prompt, sampled) }
    model.close()
    refused("closed model") { model.conversation() }
}
