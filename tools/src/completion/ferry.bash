# Completion of ferry for bash; load it with: source <(ferry completion bash)
_ferry() {
    local word help
    COMPREPLY=()
    while IFS=$'\t' read -r word help; do
        if [[ $word == :files ]]; then
            compopt -o default
            return
        fi
        COMPREPLY+=("$word")
    done < <(@FERRY@ complete -- "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2> /dev/null)
}
complete -F _ferry @NAMES@
